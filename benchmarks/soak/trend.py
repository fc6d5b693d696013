"""How much a reading grows with each merge: a line fitted by least squares, and its noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean


@dataclass(frozen=True)
class Trend:
    """One reading over the merges.

    Attributes:
        start: after the first merge.
        end: after the last.
        slope: per merge, once warm.
        error: standard error of the slope, as if readings were independent.
    """

    start: float
    end: float
    slope: float
    error: float


def trend(readings: Sequence[float], warm: int) -> Trend:
    """The line through all readings from number `warm` on.

    Args:
        readings: one after each merge.
        warm: how many are left out at the start; three at least must be left.
    """
    values = readings[warm:]
    size = len(values)
    middle, mean = (size - 1) / 2, fmean(values)
    spread = sum((index - middle) ** 2 for index in range(size))
    slope = sum((index - middle) * value for index, value in enumerate(values)) / spread
    rest = sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values))
    return Trend(readings[0], readings[-1], slope, sqrt(rest / (size - 2) / spread))
