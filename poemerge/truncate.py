"""The best low-rank approximation of an update, A ≈ A_r, in Frobenius norm (Eckart–Young).

Singular values are split evenly, A_r = (U √Σ)(√Σ Vᵀ): both factors then have the same norm, which
suits half precision, and training that goes on from them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from poemerge.errors import SettingError
from poemerge.update import LowRank, Update

SVD = ("auto", "exact", "randomised")
EXACT_SIDE = 2048  # smaller side up to which `auto` is exact: a second or two on two CPU cores
OVERSAMPLING = 10  # columns of the sketch beyond the rank
POWER_STEPS = 4  # the spectra of fine-tuning decay slowly, so that a bare sketch would lose much
BLOCK = 1 << 24  # entries that are held in fp64 at a time


def best_rank(
    update: Update, rank: int, *, svd: str = "auto", seed: int = 0
) -> tuple[LowRank, Tensor]:
    """The best approximation of rank at most `rank`, and what it misses.

    Args:
        update: (..., O, I); in factors it is truncated through them and never multiplied out.
        rank: R ≥ 1; from the full rank on the update comes back as it is.
        svd: of dense updates: `exact`, `randomised` (Halko et al. 2011, arXiv 0909.4061, algorithm
            4.4), or `auto`, which is exact where the smaller side has at most 2048 entries.
        seed: of the random sketch.

    Returns:
        Factors in the dtype of the update (fp32 at least), and the relative error ||A - A_r|| /
        ||A|| (...,) in fp64, 0 for a zero update.

    Raises:
        SettingError: the rank is below 1, or `svd` is none of these.
    """
    check_choice(rank, svd)
    if isinstance(update, LowRank):
        return _truncate_factors(update, rank)
    delta = update.delta
    side = min(delta.shape[-2:])
    if rank >= side:
        return _trivial(delta), delta.new_zeros(delta.shape[:-2], dtype=torch.float64)
    small = side <= EXACT_SIDE if svd == "auto" else svd == "exact"
    # A sketch as wide as the matrix would save nothing.
    if small or rank + OVERSAMPLING >= side:
        factors = _project(delta, rank)
    else:
        factors = _sketch(delta, rank, seed)
    return factors, relative_error(update, factors)


def check_choice(rank: int, svd: str) -> None:
    """Refuse a rank or an `svd` that there is not.

    Raises:
        SettingError: naming it.
    """
    if rank < 1:
        raise SettingError(f"rank is {rank}; choose 1 or more.")
    if svd not in SVD:
        raise SettingError(f"svd is {svd!r}; choose {', '.join(SVD)}.")


def relative_error(update: Update, factors: LowRank) -> Tensor:
    """||A - A_r|| / ||A|| (...,) in fp64, from the difference itself; 0 where both are zero.

    The shorter √(||A||² - ||A_r||²) would lose all digits below 1e-8.
    """
    if isinstance(update, LowRank):
        both = torch.cat([update.up, -factors.up.to(update.up)], dim=-1)
        missed = _norm(both, torch.cat([update.down, factors.down.to(update.down)], dim=-2))
        return _ratio(missed, _norm(update.up, update.down))
    ups = _blocks(factors.up, update.delta.shape[-1])
    down = factors.down.double()
    missed_square = whole_square = torch.zeros((), dtype=torch.float64, device=down.device)
    for part, up in zip(_blocks(update.delta), ups, strict=True):
        missed_square = missed_square + (part - up @ down).square().sum(dim=(-2, -1))
        whole_square = whole_square + part.square().sum(dim=(-2, -1))
    return _ratio(missed_square.sqrt(), whole_square.sqrt())


def _truncate_factors(update: LowRank, rank: int) -> tuple[LowRank, Tensor]:
    """Exact, through thin QR of both factors and an SVD of the core between them."""
    if update.rank <= rank:
        return update, update.up.new_zeros(update.up.shape[:-2], dtype=torch.float64)
    left, inner_left = torch.linalg.qr(update.up.double())
    right, inner_right = torch.linalg.qr(update.down.double().mT)
    u, sizes, vh = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    kept = sizes[..., :rank].unsqueeze(-2)
    factors = _split(left @ u[..., :rank] * kept, vh[..., :rank, :] @ right.mT)
    missed = torch.linalg.vector_norm(sizes[..., rank:], dim=-1)
    error = _ratio(missed, torch.linalg.vector_norm(sizes, dim=-1))
    return factors.to(update.up.device, _stored(update.up)), error


def _project(delta: Tensor, rank: int) -> LowRank:
    """Exact: A V Vᵀ for the leading right singular vectors V, from the fp64 gram.

    The gram squares the condition, but V stays orthonormal, so that what it mixes up are singular
    vectors below 1e-8 σ₁ only: less than the rounding of the fp32 weights that were subtracted.
    """
    if delta.shape[-2] < delta.shape[-1]:
        turned = _project(delta.mT, rank)
        return LowRank(turned.down.mT, turned.up.mT)
    size = delta.shape[-1]
    gram = delta.new_zeros((*delta.shape[:-2], size, size), dtype=torch.float64)
    for part in _blocks(delta):
        gram += part.mT @ part
    right = torch.linalg.eigh(gram)[1][..., -rank:].flip(-1)  # the largest first
    left = torch.cat([part @ right for part in _blocks(delta)], dim=-2)
    return _split(left, right.mT).to(delta.device, _stored(delta))


def _sketch(delta: Tensor, rank: int, seed: int) -> LowRank:
    """Randomised: the best approximation inside the range of (A Aᵀ)^q A Ω."""
    work = delta.to(_stored(delta))
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(delta.shape[-1], rank + OVERSAMPLING, generator=generator).to(work)
    basis = torch.linalg.qr(work @ probe)[0]  # (..., O, R + oversampling)
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(work.mT @ basis)[0]
        basis = torch.linalg.qr(work @ basis)[0]
    inside = _project(basis.mT @ work, rank)
    return LowRank(basis @ inside.up, inside.down)


def _trivial(delta: Tensor) -> LowRank:
    """Factors of full rank that multiply to the update bit for bit."""
    work = delta.to(_stored(delta))
    rows, columns = delta.shape[-2:]
    unit = torch.eye(min(rows, columns), dtype=work.dtype, device=work.device)
    unit = unit.expand(*delta.shape[:-2], -1, -1)
    return LowRank(work, unit) if columns <= rows else LowRank(unit, work)


def _split(left: Tensor, right: Tensor) -> LowRank:
    """Move √σ from the columns of U Σ (..., O, R) to the rows of Vᵀ (..., R, I)."""
    roots = torch.linalg.vector_norm(left, dim=-2).sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0)
    return LowRank(left * inverse.unsqueeze(-2), roots.unsqueeze(-1) * right)


def _norm(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norm (...,) of up · down in fp64; a gram would cancel where the parts nearly do."""
    inner_up = torch.linalg.qr(up.double(), mode="r")[1]
    inner_down = torch.linalg.qr(down.double().mT, mode="r")[1]
    return torch.linalg.matrix_norm(inner_up @ inner_down.mT)


def _blocks(matrix: Tensor, width: int | None = None) -> Iterator[Tensor]:
    """Blocks of rows in fp64, so that a large matrix is never held twice; `width` decides rows."""
    rows = max(1, BLOCK // (width or matrix.shape[-1]))
    return (part.double() for part in torch.split(matrix, rows, dim=-2))


def _ratio(missed: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, missed / whole, 0)


def _stored(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
