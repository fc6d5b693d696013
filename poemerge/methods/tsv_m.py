"""TSV-M: leading singular vectors of every expert, made orthogonal to one another."""

import torch

from poemerge.method import Call, Matrix, Merged, Work, always, register
from poemerge.settings import Settings
from poemerge.spectrum import EIGH, orthogonalised, svd, svd_work
from poemerge.task_vector import Stack
from poemerge.update import LowRank


def work(matrix: Matrix) -> Work:
    """A decomposition an expert, two of what is kept, and that multiplied out."""
    small, both = min(matrix.rows, matrix.columns), matrix.rows + matrix.columns
    kept = small if matrix.rank is None else min(small, matrix.rank)
    rank = None if matrix.rank is None else -(-matrix.rank // matrix.experts)
    single = svd_work(Matrix(matrix.rows, matrix.columns, 1, rank))
    size = 0 if matrix.rank is not None else matrix.rows * matrix.columns
    flops = matrix.experts * single.flops + 6.0 * both * kept**2 + 2 * EIGH * kept**3
    held = 8 * kept * (4 * both + 6 * kept) + 8 * size
    return Work(flops + 2.0 * size * kept, held + single.bytes)


@register(
    settings=Settings,
    source="Gargiulo et al. 2025, arXiv 2412.00081",
    structured=always,
    factors=always,
    work=work,
)
def tsv_m(stack: Stack, settings: Settings, call: Call) -> Merged:  # noqa: ARG001
    """Sum the experts' leading singular triplets, their directions made orthogonal to one another.

    Each of N experts keeps min(O, I) / N triplets u s vᵀ, at least one. All u side by side are
    exchanged for the nearest orthonormal ones, and so are all v. An expert's weight scales its s;
    N counts the experts that say something here, with a weight and an update that are not zero.
    """
    says = call.weights * stack.inner().diagonal(dim1=-2, dim2=-1) > 0  # (B, E)
    kept = (min(stack.shape) // says.sum(dim=-1).clamp_min(1)).clamp_min(1)  # (B,)
    most = int(kept.max())
    lefts, sizes, rights = [], [], []
    for update, weight in zip(stack.updates(), call.weights.unbind(dim=-1), strict=True):
        left, size, right = svd(update)
        place = torch.arange(size.shape[-1], device=size.device)
        lefts.append(left[..., :most].clone())
        rights.append(right[..., :most].clone())
        sizes.append((weight[:, None] * size * (place < kept[:, None]))[..., :most])
    size = torch.cat(sizes, dim=-1).unsqueeze(-2)  # (B, 1, K)
    left = orthogonalised(torch.cat(lefts, dim=-1) * (size > 0))
    right = orthogonalised(torch.cat(rights, dim=-1) * (size > 0))
    return Merged(stack.express(LowRank(left * size, right.mT)))
