"""Residuals of one matrix, and of all matrices pooled, as plain data (docs/residuals.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from poemerge.residuals.densities import DENSITIES, Density
from poemerge.residuals.tail import Histogram, tail_index
from poemerge.residuals.verdict import MET, TOO_FEW, best_expert, best_of, sentence

FEWEST = 100  # entries from which a tail can be told
ROUNDED = 0.3  # part of the residuals that may be rounding; more would be fitted instead of them
POOLED = 1 << 21  # entries of all matrices that are fitted together


@dataclass(frozen=True)
class Sample:
    """Entries of one matrix's residuals, over all experts.

    Attributes:
        sizes: |r| (N,) in rising order, zeros left out, in the unit of sampling.py; fp64.
        zeros: how many were left out.
        rounding: what part of their root mean square the rounding of M alone would make.
    """

    sizes: Tensor
    zeros: int
    rounding: float

    @classmethod
    def of(cls, values: Sequence[Tensor], rounding: Sequence[float]) -> Self:
        """Of the signed entries of each expert, and the root mean square of their rounding."""
        sizes = torch.cat([entries.abs() for entries in values]).sort().values
        kept = sizes[sizes > 0]
        noise = math.fsum(n**2 * len(v) for n, v in zip(rounding, values, strict=True))
        square = float(kept.square().sum())
        share = math.sqrt(noise / square) if square > 0 else 0.0
        return cls(kept, len(sizes) - len(kept), share)

    @property
    def scale(self) -> float:
        """Median magnitude; 0 where all are 0."""
        return float(self.sizes[len(self.sizes) // 2]) if len(self.sizes) else 0.0

    @property
    def left_out(self) -> str:
        """Why there is nothing to fit; empty if there is."""
        if not len(self.sizes) or self.rounding > ROUNDED:
            return "rounding"
        return "few entries" if len(self.sizes) < FEWEST else ""


@dataclass(frozen=True)
class Fits:
    """All densities, fitted to the same magnitudes."""

    densities: Mapping[str, Density]
    likelihoods: Mapping[str, float]  # mean log-likelihood of a signed entry, in nats

    @classmethod
    def of(cls, sizes: Tensor) -> Self:
        """Of |r| (N,) > 0."""
        fitted = {name: density.fit(sizes) for name, density in DENSITIES.items()}
        means = {name: float(fit.log_density(sizes).mean()) for name, fit in fitted.items()}
        return cls(fitted, means)

    @property
    def nu(self) -> float:
        """Degrees of freedom of the Student-t."""
        return float(asdict(self.densities["student_t"])["nu"])

    def as_dict(self, centres: Tensor) -> dict[str, Any]:
        """Parameters, likelihood, and the density of |r| at the centres of the histogram."""
        return {
            name: {
                "parameters": asdict(fit),
                "log_likelihood": self.likelihoods[name],
                "density": (2 * fit.log_density(centres).exp()).tolist(),
            }
            for name, fit in self.densities.items()
        }


def describe_matrix(sample: Sample) -> dict[str, Any]:
    """One entry of `tensors`."""
    found: dict[str, Any] = {
        "entries": len(sample.sizes),
        "zeros": sample.zeros,
        "scale": sample.scale,
        "rounding": sample.rounding,
        "left_out": sample.left_out,
        "nu": None,
        "tail_index": None,
        "best": None,
        "log_likelihoods": {},
    }
    if sample.left_out:
        return found
    sizes = sample.sizes / sample.scale
    fits = Fits.of(sizes)
    return found | {
        "nu": fits.nu,
        "tail_index": tail_index(sizes),
        "best": best_of(fits.likelihoods),
        "log_likelihoods": dict(fits.likelihoods),
    }


def describe_pool(
    samples: Sequence[Sample], matrices: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All matrices together, each in units of its own scale, and the verdict.

    Args:
        samples: of the matrices.
        matrices: what `describe_matrix` said of each.
    """
    kept = [s.sizes / s.scale for s in samples if not s.left_out]
    if not kept:
        met = any(sample.left_out == "rounding" for sample in samples)
        return _nothing(MET if met else TOO_FEW)
    step = -(-sum(map(len, kept)) // POOLED)
    # Every step-th of an ordered sample keeps its distribution; from alternate starts, no bias.
    thinned = [sizes[index % step :: step] for index, sizes in enumerate(kept)]
    ordered = torch.cat(thinned).sort().values
    histogram, fits = Histogram.of(ordered), Fits.of(ordered)
    expert = best_expert(fits.likelihoods)
    alone = [best_expert(m["log_likelihoods"]) for m in matrices if not m["left_out"]]
    return {
        "entries": len(ordered),
        "histogram": {name: value.tolist() for name, value in vars(histogram).items()},
        "fits": fits.as_dict(histogram.centres),
        "nu": fits.nu,
        "tail_index": tail_index(ordered),
        "best": best_of(fits.likelihoods),
        "verdict": sentence(
            fits.likelihoods, fits.nu, alone.count(expert), len(alone), len(samples) - len(alone)
        ),
    }


def _nothing(verdict: str) -> dict[str, Any]:
    return {
        "entries": 0,
        "histogram": {"edges": [], "centres": [], "density": []},
        "fits": {},
        "nu": None,
        "tail_index": None,
        "best": None,
        "verdict": verdict,
    }
