"""The histogram of residuals on logarithmic axes, and how heavy their tail is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 60
SMALLEST = 1e-3  # part of the magnitudes that lies below the first bin: a log axis has no 0
TAIL = 0.05  # part of the magnitudes that the tail index is read from


@dataclass(frozen=True)
class Histogram:
    """A density of magnitudes.

    Attributes:
        edges: of the bins (BINS + 1,), evenly spaced in the logarithm.
        centres: geometric means of the edges (BINS,).
        density: share of all magnitudes in a bin over its width (BINS,).
    """

    edges: Tensor
    centres: Tensor
    density: Tensor

    @classmethod
    def of(cls, ordered: Tensor) -> "Histogram":
        """Of |r| (N,) > 0 in rising order; those below the first bin count in the whole."""
        low, high = float(ordered[int(SMALLEST * len(ordered))]), float(ordered[-1])
        if low == high:
            low, high = low / 2, high * 2
        edges = torch.logspace(math.log10(low), math.log10(high), BINS + 1, dtype=torch.float64)
        edges[0], edges[-1] = low, high
        below = torch.searchsorted(ordered, edges)
        below[-1] = len(ordered)  # the largest is in the last bin
        density = below.diff() / (len(ordered) * edges.diff())
        return cls(edges, (edges[:-1] * edges[1:]).sqrt(), density)


def tail_index(ordered: Tensor) -> dict[str, float] | None:
    """Hill's estimate of α in P(|r| > x) ~ x^-α, from the k largest magnitudes (Hill 1975).

        α = k / Σ_{j ≤ k} ln(x_(j) / x_(k + 1)),  standard error α / √k

    Cauchy has α = 1, Student-t α = ν; below 2 there is no variance. Lighter tails are no power law
    and have no α: the estimate is then large, and grows as the part does.

    Args:
        ordered: |r| (N,) > 0 in rising order, two at least.

    Returns:
        `estimate`, `standard_error` (as of independent entries), and `entries` k; None where all
        of these are equal.
    """
    count = max(1, round(TAIL * (len(ordered) - 1)))
    largest = ordered[-count:]
    total = float((largest / ordered[-count - 1]).log().sum())
    if total <= 0:
        return None
    estimate = count / total
    return {
        "estimate": estimate,
        "standard_error": estimate / math.sqrt(count),
        "entries": count,
    }
