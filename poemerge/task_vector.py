"""What fine-tuning changed, A = W - W₀: dense, or as low-rank factors kept apart.

A stack holds the task vectors of all experts for a batch of tensors of one shape. Both kinds of
stack offer the same three views, so that a method is written once:

    dense()         the updates themselves, (B, E, O, I)
    combine(w)      Σ w_i A_i, in factors where the stack is in factors
    coordinates()   smaller matrices with the same inner products, and the way back (subspace.py)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poemerge.subspace import JointSpace


@dataclass(frozen=True)
class LowRank:
    """An update in factors, A = up · down; batched where the factors are."""

    up: Tensor  # (..., O, R)
    down: Tensor  # (..., R, I)

    @classmethod
    def zero(cls, rows: int, columns: int) -> Self:
        """The update of an adapter that leaves this tensor alone."""
        return cls(torch.zeros(rows, 0), torch.zeros(0, columns))

    @property
    def rank(self) -> int:
        """Inner dimension R of the factors."""
        return self.up.shape[-1]

    def dense(self) -> Tensor:
        """The update itself, (..., O, I)."""
        return self.up @ self.down

    def norm(self) -> Tensor:
        """Frobenius norm (...,) in fp64, from the R × R grams of the factors."""
        up, down = self.up.double(), self.down.double()
        return ((up.mT @ up) * (down @ down.mT)).sum(dim=(-2, -1)).clamp_min(0).sqrt()

    def part(self, index: int) -> "LowRank":
        """One update of a batch."""
        return LowRank(self.up[index], self.down[index])

    def scaled(self, strength: float) -> "LowRank":
        """The update times a number."""
        return LowRank(self.up * strength, self.down)

    def to(self, device: torch.device, dtype: torch.dtype) -> "LowRank":
        """The same factors elsewhere."""
        return LowRank(self.up.to(device, dtype), self.down.to(device, dtype))


@dataclass(frozen=True)
class Dense:
    """An update as it is; any shape."""

    delta: Tensor  # (..., O, I)

    def dense(self) -> Tensor:
        """The update itself."""
        return self.delta

    def norm(self) -> Tensor:
        """Frobenius norm in fp64, over all axes."""
        return self.delta.square().sum(dtype=torch.float64).sqrt()

    def part(self, index: int) -> "Dense":
        """One update of a batch."""
        return Dense(self.delta[index])

    def scaled(self, strength: float) -> "Dense":
        """The update times a number."""
        return Dense(self.delta * strength)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dense":
        """The same update elsewhere."""
        return Dense(self.delta.to(device, dtype))


Update = LowRank | Dense
Lift = Callable[[Tensor], Update]


@dataclass(frozen=True)
class DenseStack:
    """Dense task vectors of E experts for B tensors of one shape (vectors and more axes too)."""

    deltas: Tensor  # (B, E, *shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one update."""
        return tuple(self.deltas.shape[2:])

    def dense(self) -> Tensor:
        """The updates, (B, E, *shape)."""
        return self.deltas

    def combine(self, weights: Tensor) -> Update:
        """Σ w_i A_i for weights (E,)."""
        return Dense(torch.einsum("be...,e->b...", self.deltas, weights.to(self.deltas)))

    def coordinates(self) -> tuple[Tensor, Lift]:
        """The updates themselves in fp64: a dense stack is its own space."""
        return self.deltas.double(), Dense


@dataclass(frozen=True)
class LowRankStack:
    """Task vectors in factors, of E experts for B matrices of one shape; ranks may differ."""

    ups: tuple[Tensor, ...]  # E × (B, O, R_i)
    downs: tuple[Tensor, ...]  # E × (B, R_i, I)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (O, I) of one update."""
        return self.ups[0].shape[-2], self.downs[0].shape[-1]

    def dense(self) -> Tensor:
        """The updates multiplied out, (B, E, O, I), in fp32 or better."""
        return torch.stack([u @ d for u, d in zip(self.ups, self.downs, strict=True)], dim=1)

    def combine(self, weights: Tensor) -> Update:
        """Σ w_i A_i for weights (E,), exact in factors of rank Σ R_i."""
        ups = [up * weight for up, weight in zip(self.ups, weights, strict=True)]
        return LowRank(torch.cat(ups, dim=-1), torch.cat(self.downs, dim=-2))

    def coordinates(self) -> tuple[Tensor, Lift]:
        """The updates in their joint column and row space, (B, E, K, K'), in fp64; exact."""
        space = JointSpace.of(self.ups, self.downs)
        return space.coordinates, lambda inner: LowRank(*space.factors(inner))


Stack = DenseStack | LowRankStack


def stack(updates: Sequence[Sequence[Update]]) -> Stack:
    """Stack the updates of a batch of tensors: outer index B, inner index E.

    In factors where every expert is; one dense expert makes the stack dense.
    """
    factors = [[u for u in row if isinstance(u, LowRank)] for row in updates]
    if all(len(row) == len(given) for row, given in zip(factors, updates, strict=True)):
        columns = list(zip(*factors, strict=True))
        return LowRankStack(
            ups=tuple(torch.stack([update.up for update in column]) for column in columns),
            downs=tuple(torch.stack([update.down for update in column]) for column in columns),
        )
    return DenseStack(torch.stack([torch.stack([u.dense() for u in row]) for row in updates]))
