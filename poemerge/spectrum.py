"""Singular values and directions of updates, in fp64, from the smaller gram.

A gram squares the condition: a direction whose singular value is σ, relative to the largest, comes
out to 1e-16 / σ², which is 1e-6 at ZERO. Below that it counts as zero. Directions in which nothing
was learnt are whatever rounding makes of them, and a method that weighs all directions alike would
blow them up; without them an update in factors and the same multiplied out have one spectrum.
"""

import torch
from torch import Tensor

from poemerge.method import Matrix, Work
from poemerge.update import LowRank, Update

ZERO = 1e-5  # of the largest singular value; far above the rounding of weights in fp32
# Operations at the rate of a matrix product, measured on CPUs:
EIGH = 20  # · N³, of an eigendecomposition
QR = 10  # of each that a QR decomposition of an adapter's slim factor has


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of A from A Aᵀ, the largest first.

    Args:
        gram: A Aᵀ (..., N, N), in fp64.

    Returns:
        U (..., N, N) and s (..., N); where s counts as zero it is zero, and so is the column of U.
    """
    values, vectors = torch.linalg.eigh(gram)
    sizes = values.clamp_min(0).sqrt().flip(-1)
    sizes = sizes * (sizes > ZERO * sizes[..., :1])
    return vectors.flip(-1) * (sizes > 0).unsqueeze(-2), sizes


def svd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition A = U diag(s) Vᵀ in fp64, the largest first.

    Args:
        update: (..., O, I); in factors it is decomposed through them and never multiplied out.

    Returns:
        U (..., O, K), s (..., K) and V (..., I, K); where s counts as zero it is zero, and so are
        the columns of U and V.
    """
    if not isinstance(update, LowRank):
        return _svd(update.delta.double())
    left, up = torch.linalg.qr(update.up.double())
    right, down = torch.linalg.qr(update.down.double().mT)
    inner_left, sizes, inner_right = _svd(up @ down.mT)
    return left @ inner_left, sizes, right @ inner_right


def orthogonalised(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: P Qᵀ of the SVD P diag(s) Qᵀ (Procrustes).

    Columns that depend on each other have no unique one; they share what they span, P Qᵀ taken
    over the s that are not zero.

    Args:
        columns: (..., N, K), in fp64.
    """
    left, _, right = _svd(columns)
    return left @ right.mT


def svd_work(matrix: Matrix) -> Work:
    """What `svd` takes of one update (O, I), or of one in factors of rank `matrix.rank`."""
    small, large = sorted((matrix.rows, matrix.columns))
    if matrix.rank is None:
        return Work(4.0 * small**2 * large + EIGH * small**3, 8 * small * (3 * large + 4 * small))
    rank, both = matrix.rank, small + large
    flops = (4.0 * QR + 2) * both * rank**2 + (EIGH + 6) * rank**3
    return Work(flops, 8 * rank * (4 * both + 6 * rank))


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if matrix.shape[-2] > matrix.shape[-1]:
        right, sizes, left = _svd(matrix.mT)
        return left, sizes, right
    left, sizes = principal(matrix @ matrix.mT)
    inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
    return left, sizes, matrix.mT @ (left * inverse.unsqueeze(-2))
