"""KnOTS: TIES in the joint basis of all task vectors."""

from dataclasses import dataclass, replace

import torch

from poemerge.method import Call, Matrix, Merged, Work, always, register
from poemerge.methods.ties import TiesSettings, trim_and_elect
from poemerge.settings import setting
from poemerge.spectrum import EIGH, principal
from poemerge.task_vector import Stack

ROUNDING = 1e-7  # of the largest singular value; fp32 leaves no sign to a coordinate below
TIES = 2000  # · E · K · I: TIES in operations at the rate of a matrix product, measured


@dataclass(frozen=True)
class KnotsSettings(TiesSettings):
    """Settings of `knots_ties`."""

    keep: float = setting(
        0.2,
        "fraction of each expert's coordinates in the joint basis that is kept, largest first",
        low=0.0,
        high=1.0,
    )


def work(matrix: Matrix) -> Work:
    """The joint basis, every expert's coordinates in it, and TIES on those."""
    rank = min(matrix.rows, matrix.rank or matrix.experts * matrix.columns)
    size = rank * matrix.columns
    joint = 4.0 * matrix.rows * rank**2 if rank < matrix.rows else 0.0
    flops = joint + 2.0 * size * matrix.rows + EIGH * rank**3
    flops += matrix.experts * size * (4.0 * rank + TIES)
    held = (5 * matrix.experts + 3) * size + 4 * rank**2 + 3 * matrix.rows * rank
    return Work(flops, 8 * held)


@register(
    settings=KnotsSettings,
    source="Stoica et al. 2024, arXiv 2410.19735",
    structured=always,
    factors=always,
    work=work,
)
def knots_ties(stack: Stack, settings: KnotsSettings, call: Call) -> Merged:
    """TIES on coordinates in a basis that all experts share: [τ_1 | ... | τ_E] = U S [V_1 | ...]ᵀ.

    What is merged is S V_iᵀ = Uᵀ τ_i, as the published settings have it, so that directions count
    by their size when entries are trimmed; trimmed is matrix by matrix, as in `ties`. An expert's
    weight is that of TIES, and its part in the basis: a weight of two is the expert twice.
    """
    small, lift = stack.double().reduced(rows=True, columns=False)  # (B, E, K, I)
    gram = small.new_zeros(small.shape[0], *2 * small.shape[2:3])
    for update, weight in zip(small.unbind(dim=1), call.weights.unbind(dim=1), strict=True):
        gram += weight[:, None, None] * (update @ update.mT)
    basis, sizes = principal(gram)
    aligned = basis.mT.unsqueeze(1) @ small
    aligned *= aligned.abs() > ROUNDING * sizes[:, None, :1, None]
    ranks = (sizes > 0).sum(dim=-1).clamp_min(1).tolist()
    merged = torch.zeros_like(aligned[:, 0])
    for index, rank in enumerate(ranks):
        own = replace(call, weights=call.weights[index : index + 1])
        rows = aligned[index : index + 1, :, :rank]
        merged[index, :rank] = trim_and_elect(rows, settings, own)[0]
    return Merged(lift(basis @ merged))
