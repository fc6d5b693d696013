"""Iso-C: the sum of task vectors with a flat spectrum."""

from poemerge.method import Call, Matrix, Merged, Work, always, register
from poemerge.settings import Settings
from poemerge.spectrum import svd, svd_work
from poemerge.task_vector import Stack
from poemerge.update import LowRank


def work(matrix: Matrix) -> Work:
    """One decomposition of the sum, and its directions multiplied out."""
    small = min(matrix.rows, matrix.columns)
    found = svd_work(matrix)
    if matrix.rank is not None:
        return found
    size = matrix.rows * matrix.columns
    return Work(found.flops + 2.0 * size * small, found.bytes + 8 * size)


@register(
    settings=Settings,
    source="Marczak et al. 2025, arXiv 2502.04959",
    structured=always,
    factors=always,
    work=work,
)
def iso_c(stack: Stack, settings: Settings, call: Call) -> Merged:  # noqa: ARG001
    """Give every direction of the weighted sum Σ w_i τ_i = U S Vᵀ the same size: mean(S) U Vᵀ.

    The mean runs over the singular values that are not zero. For matrices of full rank, which the
    paper has, these are all. Adapters span K ≤ Σ R_i directions: the others are not determined, and
    counting their zeros would shrink the merge to K / min(O, I) of its size. Either way the nuclear
    norm Σ s stays that of the sum.
    """
    total = stack.combine(call.weights)
    left, sizes, right = svd(total)
    mean = sizes.sum(dim=-1) / (sizes > 0).sum(dim=-1).clamp_min(1)  # (B,)
    return Merged(stack.express(LowRank(left * mean[:, None, None], right.mT)))
