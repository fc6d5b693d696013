"""Linear algebra on batches: fp64 scalars from fp32 matrices, Cholesky, extreme eigenvalues.

Nothing here waits for a device: failures are returned as tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

POWER_STEPS = 6
POWER_VECTORS = 8
RUN = 2048  # products that are summed in fp32 before fp64 takes over


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius products <L_be, R_b> (B, E), in fp64, in one pass over L.

    fp32 products are summed in fp32 over short runs, and in fp64 from there.

    Args:
        left: (B, E, O, I).
        right: (B, O, I).
    """
    left, right = left.flatten(-2), right.flatten(-2)
    whole = 0 if left.dtype == torch.float64 else left.shape[-1] // RUN * RUN
    rest = torch.einsum("ben,bn->be", left[..., whole:].double(), right[..., whole:].double())
    if not whole:
        return rest
    runs = (side[..., :whole].unflatten(-1, (-1, RUN)) for side in (left, right))
    # Batch by batch: as one product, all of L would be copied first.
    sums = [torch.einsum("ern,rn->er", a, b) for a, b in zip(*runs, strict=True)]
    return rest + torch.stack(sums).sum(dim=-1, dtype=torch.float64)


def square_norm(tensor: Tensor) -> Tensor:
    """||A||² over the last axis (...,), in fp64, summed like `inner`."""
    whole = 0 if tensor.dtype == torch.float64 else tensor.shape[-1] // RUN * RUN
    rest = tensor[..., whole:].double().square().sum(dim=-1)
    runs = tensor[..., :whole].unflatten(-1, (whole // RUN, RUN))
    return rest + torch.linalg.vector_norm(runs, dim=-1).double().square().sum(dim=-1)


def pairwise(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius products <L, R> over the last two axes (...,), in fp64."""
    return torch.einsum("...ij,...ij->...i", left, right).sum(dim=-1, dtype=torch.float64)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor (..., N, N), and True (...,) where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor, failed != 0


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve (L Lᵀ) X = B for a factor from `cholesky`.

    Args:
        factor: (..., N, N), lower.
        right: (..., N, K).
    """
    return torch.cholesky_solve(right, factor)


def extreme_eigenvalues(matrix: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue (...,) of each matrix, by power iteration, in fp64.

    Both are estimates from inside the spectrum: good to a few per cent, which is what a condition
    number is for.
    """
    return 1 / _power(lambda v: solve(factor, v), matrix), _power(lambda v: matrix @ v, matrix)


def _power(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The best of a few power iterations side by side; one alone would be slower to solve."""
    # Fixed quasi-random starts: reproducible, and orthogonal to no eigenvector in practice.
    size = like.shape[-1]
    count = torch.arange(1, size * POWER_VECTORS + 1, dtype=like.dtype, device=like.device)
    vectors = torch.cos(count.square()).view(size, POWER_VECTORS).expand(*like.shape[:-2], -1, -1)
    value = torch.ones_like(vectors[..., 0, :])
    for _ in range(POWER_STEPS):
        vectors = apply(vectors / torch.linalg.vector_norm(vectors, dim=-2, keepdim=True))
        value = torch.linalg.vector_norm(vectors, dim=-2)
    return value.amax(dim=-1).double()
