"""Checked linear algebra on batches of symmetric positive definite systems."""

import torch
from torch import Tensor

from poemerge.errors import NumericalError

POWER_STEPS = 12


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of each matrix (..., N, N), in fp64 where fp32 does not suffice.

    Raises:
        NumericalError: a matrix is not positive definite even in fp64.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return factor
    factor, failed = torch.linalg.cholesky_ex(matrix.double())
    if bool(failed.any()):
        raise NumericalError(
            "A merge system is not positive definite even in fp64; raise the setting `ridge`."
        )
    return factor


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve (L Lᵀ) X = B for a factor from `cholesky`, in the dtype of B.

    Args:
        factor: (..., N, N), lower.
        right: (..., N, K).
    """
    return torch.cholesky_solve(right.to(factor), factor).to(right)


def extreme_eigenvalues(matrix: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue (...,) of each matrix, by power iteration.

    Both are estimates from inside the spectrum: good to a few per cent, which is what a condition
    number is for.
    """
    return 1 / _power(lambda v: solve(factor, v), matrix), _power(lambda v: matrix @ v, matrix)


def _power(apply, like: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    # A fixed quasi-random start: reproducible, and orthogonal to no eigenvector in practice.
    size = like.shape[-1]
    start = torch.cos(torch.arange(1, size + 1, dtype=like.dtype, device=like.device).square())
    vector = start.expand(*like.shape[:-2], size).unsqueeze(-1)
    value = torch.ones_like(vector[..., 0, 0])
    for _ in range(POWER_STEPS):
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = apply(vector)
        value = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return value
