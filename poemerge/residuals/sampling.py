"""Entries of the directional residuals of one matrix, drawn without forming the residuals.

R_i = A_iᵀ (M - A_i) is (I, I). A block of it, some rows by some columns, needs only as many columns
of A_i and M, and through factors only R × I numbers on the way. The input side,
(M - A_i) A_iᵀ, is the transpose of the output side of the transposes.
"""

import torch
from torch import Tensor

from poemerge.linalg import square_norm
from poemerge.statistics import fourth_moment
from poemerge.update import LowRank, Update

ROWS = 256  # of a residual that entries are drawn from
COLUMNS = 2048


def draw_entries(
    update: Update, merged: Update, count: int, rounding: float, draw: torch.Generator
) -> tuple[Tensor, float] | None:
    """Entries of A_iᵀ (M - A_i), `count` of them or all where there are no more.

    Rows and columns are drawn first, then entries of their block, with replacement: every entry
    of the residual is as likely as any other.

    Args:
        update: A_i (O, I), fp32.
        merged: M (O, I), fp32.
        count: N at most.
        rounding: root mean square of the rounding in the entries of M.
        draw: on the CPU.

    Returns:
        r (N,) in fp64, in units of the root mean square of A_iᵀ A_i, which is what residuals are
        at M = 0; and the root mean square that the rounding of M alone would give them. None where
        A_i = 0: such an expert has no directions, hence no residual.
    """
    origin = float(fourth_moment(update).sqrt())  # ||A_iᵀ A_i||
    if origin == 0:
        return None
    side = _width(update)
    rows, columns = (_some(side, limit, draw) for limit in (ROWS, COLUMNS))
    block = residual_block(update, merged, rows, columns).flatten()
    if block.numel() > count:
        block = block[torch.randint(block.numel(), (count,), generator=draw)]
    # An entry of A_iᵀ Δ, with Δ independent of variance s², has variance ||A_i||² s² / I on
    # average; the unit is ||A_iᵀ A_i|| / I.
    noise = float(update.norm()) * rounding * side**0.5 / origin
    return block * (side / origin), noise


def rounding_of(update: Update, start: Tensor, dtype: torch.dtype) -> float:
    """Root mean square by which storing W₀ + M, or M in factors, in `dtype` moves entries of M.

    A rounded number is off by a part ε / √12, or less between two powers of two.

    Args:
        update: M (O, I).
        start: W₀ (O, I).
        dtype: as stored.
    """
    step: float = torch.finfo(dtype).eps / 12**0.5
    if isinstance(update, LowRank):  # both factors are rounded
        ups = update.up.double().square().sum(dim=0)
        downs = update.down.double().square().sum(dim=1)
        return step * float(2 * (ups @ downs) / start.numel()) ** 0.5
    return step * float(square_norm((start + update.delta).flatten()) / start.numel()) ** 0.5


def residual_block(update: Update, merged: Update, rows: Tensor, columns: Tensor) -> Tensor:
    """Those rows and columns of A_iᵀ (M - A_i), in fp64.

    In factors A = up · down this is downᵀ (upᵀ M - upᵀ up · down), and upᵀ M likewise where M is
    in factors too. It may cancel to nothing although M - A_i is large, so that factors are taken
    in fp64.
    """
    if isinstance(update, LowRank):
        up, down = update.up.double(), update.down.double()
        inner = _times(up.mT, merged, columns) - (up.mT @ up) @ down[:, columns]
        return down[:, rows].mT @ inner
    gap = _columns(merged, columns) - update.delta[:, columns]
    return (update.delta[:, rows].mT @ gap).double()


def _times(left: Tensor, right: Update, columns: Tensor) -> Tensor:
    """Those columns of a product with an update, in fp64."""
    if isinstance(right, LowRank):
        return (left @ right.up.double()) @ right.down[:, columns].double()
    return left @ right.delta[:, columns].double()


def _columns(update: Update, columns: Tensor) -> Tensor:
    if isinstance(update, LowRank):
        return update.up @ update.down[:, columns]
    return update.delta[:, columns]


def _width(update: Update) -> int:
    return (update.down if isinstance(update, LowRank) else update.delta).shape[-1]


def _some(size: int, limit: int, draw: torch.Generator) -> Tensor:
    """Up to `limit` of the indices below `size`; in order where that is all of them."""
    if size <= limit:
        return torch.arange(size)
    return torch.randperm(size, generator=draw)[:limit]
