"""What certifies a solved matrix, as plain data (docs/certificates.md)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.experts import Form
from poemerge.poe.inference import Mode

TRUSTED_ERROR = 1e-2  # bound on the part of a result that may be rounding; most is far below
TRUSTED_NOISE = 1e-3  # likewise of the weights


@dataclass(frozen=True)
class Certificate:
    """One solved matrix, or one piece of it.

    Attributes:
        steps: reweightings; 0 for a closed form.
        converged: False where `max_steps` came first.
        energies: at the start and after each step; none is above the one before.
        weights: α_i in the normal equation.
        residual: ||H M - b|| / ||b|| with the weights that M itself asks for: 0 at a mode.
        condition: largest over smallest eigenvalue of H.
        norms: ||A_i||².
        size: ||M||².
        noise: by what part the weights may be off through rounding.
        dtype: in which the matrices were computed.
        pieces: how many pieces of the matrix were solved.
    """

    steps: int
    converged: bool
    energies: tuple[float, ...]
    weights: tuple[float, ...]
    residual: float
    condition: float
    norms: tuple[float, ...]
    size: float
    noise: float
    dtype: str
    pieces: int = 1

    @property
    def has_failed(self) -> bool:
        """True if H was not positive definite."""
        return self.condition == math.inf

    @property
    def is_trusted(self) -> bool:
        """True if rounding takes no more than the digits that a merged weight can spare."""
        epsilon = torch.finfo(getattr(torch, self.dtype)).eps
        return self.condition * epsilon <= TRUSTED_ERROR and self.noise <= TRUSTED_NOISE

    def as_dict(self) -> dict[str, Any]:
        """For reports: weights add up to 1, and growth is ||M|| / max ||A_i||."""
        largest = max(self.norms)
        return {
            "steps": self.steps,
            "converged": self.converged,
            "energies": list(self.energies),
            "weights": list(_shares(self.weights)),
            "residual": self.residual,
            "condition": self.condition,
            "growth": math.sqrt(self.size / largest) if largest > 0 else 0.0,
            "noise": self.noise,
            "dtype": self.dtype,
            "pieces": self.pieces,
        }


def certify(form: Form, mode: Mode, ridge: Tensor) -> list[Certificate]:
    """A certificate for each matrix of the batch."""
    residual, condition = form.certify(mode.merged, mode.weights, ridge)
    condition = torch.where(mode.failed, math.inf, condition)
    size = linalg.square_norm(mode.merged.mT.flatten(-2))
    steps = mode.steps.tolist()
    columns = zip(
        steps,
        mode.converged.tolist(),
        torch.stack(mode.energies, dim=-1).tolist(),
        mode.weights.tolist(),
        residual.tolist(),
        condition.tolist(),
        form.norms.tolist(),
        size.tolist(),
        mode.noise.tolist(),
        strict=True,
    )
    dtype = str(mode.merged.dtype).removeprefix("torch.")
    return [
        Certificate(
            taken,
            settled,
            tuple(energies[: taken + 1]),
            tuple(weights),
            residual=miss,
            condition=spread,
            norms=tuple(norms),
            size=square,
            noise=noise,
            dtype=dtype,
        )
        for taken, settled, energies, weights, miss, spread, norms, square, noise in columns
    ]


def combine(pieces: Sequence[Certificate]) -> Certificate:
    """One certificate for the pieces of a matrix: sums, means, or the worst of them."""
    if len(pieces) == 1:
        return pieces[0]
    steps = max(piece.steps for piece in pieces)
    padded = [p.energies + p.energies[-1:] * (steps - p.steps) for p in pieces]
    shares = [_shares(piece.weights) for piece in pieces]
    return Certificate(
        steps=steps,
        converged=all(piece.converged for piece in pieces),
        energies=tuple(map(sum, zip(*padded, strict=True))),
        weights=tuple(sum(column) / len(pieces) for column in zip(*shares, strict=True)),
        residual=max(piece.residual for piece in pieces),
        condition=max(piece.condition for piece in pieces),
        norms=tuple(map(sum, zip(*(piece.norms for piece in pieces), strict=True))),
        size=sum(piece.size for piece in pieces),
        noise=max(piece.noise for piece in pieces),
        dtype=min(piece.dtype for piece in pieces),
        pieces=sum(piece.pieces for piece in pieces),
    )


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total if total > 0 else 0.0 for weight in weights)
