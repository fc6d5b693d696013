"""What fine-tuning changed, A = W - W₀: dense, or as low-rank factors kept apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


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
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.up.device

    @property
    def rank(self) -> int:
        """Inner dimension R of the factors."""
        return self.up.shape[-1]

    @property
    def mT(self) -> "LowRank":  # noqa: N802 - as torch spells it
        """The transpose."""
        return LowRank(self.down.mT, self.up.mT)

    def dense(self) -> Tensor:
        """The update itself, (..., O, I)."""
        return self.up @ self.down

    def inner(self, other: "LowRank") -> Tensor:
        """<A, B> (...,) in fp64, from the R_A × R_B grams of the factors."""
        ups = self.up.double().mT @ other.up.double()
        downs = self.down.double() @ other.down.double().mT
        return (ups * downs).sum(dim=(-2, -1))

    def norm(self) -> Tensor:
        """Frobenius norm (...,) in fp64."""
        return self.inner(self).clamp_min(0).sqrt()

    def part(self, index: int) -> "LowRank":
        """One update of a batch."""
        return LowRank(self.up[index], self.down[index])

    def scaled(self, strength: float) -> "LowRank":
        """The update times a number."""
        return self if strength == 1 else LowRank(self.up * strength, self.down)

    def to(self, device: torch.device, dtype: torch.dtype) -> "LowRank":
        """The same factors elsewhere."""
        return LowRank(self.up.to(device, dtype), self.down.to(device, dtype))


@dataclass(frozen=True)
class Dense:
    """An update as it is; any shape."""

    delta: Tensor  # (..., O, I)

    @property
    def device(self) -> torch.device:
        """Where the update is."""
        return self.delta.device

    @property
    def mT(self) -> "Dense":  # noqa: N802 - as torch spells it
        """The transpose."""
        return Dense(self.delta.mT)

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
        return self if strength == 1 else Dense(self.delta * strength)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dense":
        """The same update elsewhere."""
        return Dense(self.delta.to(device, dtype))


Update = LowRank | Dense
Lift = Callable[[Tensor], Update]
