"""Exact selection from very many numbers: a sample brackets the answer, one pass settles it."""

import torch
from torch import Tensor

SAMPLE = 1 << 16  # numbers that bracket the answer
MARGIN = 6.0  # standard errors of the sample's quantile, on either side
BLOCK = 1 << 18  # numbers that are looked at at a time, so that they stay in the caches


def kth_largest_magnitude(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest |v|, exactly.

    Args:
        values: (N,).
        count: 1 to N.
    """
    if values.numel() <= 4 * SAMPLE:
        return _kth_largest(values.abs(), count)
    low, high = _bracket(values, count)
    above, between = 0, []
    for block in values.split(BLOCK):
        magnitude = block.abs()
        above += int((magnitude > high).sum())
        between.append(magnitude[(magnitude >= low) & (magnitude <= high)])
    inside = torch.cat(between)
    if 0 < count - above <= inside.numel():
        return _kth_largest(inside, count - above)
    return _kth_largest(values.abs(), count)  # the sample was not like the rest


def _bracket(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two magnitudes that almost surely have the wanted one between them."""
    sample = values[:: values.numel() // SAMPLE].abs().sort().values
    size, share = sample.numel(), 1 - count / values.numel()
    margin = MARGIN * (share * (1 - share) * size) ** 0.5 + 2
    first = min(max(int(share * size - margin), 0), size - 1)
    last = min(int(share * size + margin), size - 1)
    low = sample[first] if first > 0 else sample.new_zeros(())
    high = sample[last] if last < size - 1 else sample.new_full((), torch.inf)
    return low, high


def _kth_largest(magnitudes: Tensor, count: int) -> Tensor:
    return magnitudes.kthvalue(magnitudes.numel() - count + 1).values
