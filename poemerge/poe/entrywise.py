"""Residual forms whose precision is one number an entry: all alike, or Fisher information.

q_i(M) = Σ P_i ⊙ (M - A_i)²,  P_i = 1 or a diagonal Fisher (docs/family.md)
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.root import DiagonalRoot


@dataclass(frozen=True)
class Entrywise:
    """Forms of E experts for B tensors, (B, E, O, I); vectors are (B, E, 1, I)."""

    targets: Tensor  # P_i ⊙ A_i (B, E, O, I)
    precisions: Tensor | None  # P_i (B, E, O, I), None where all are 1
    norms: Tensor  # ||A_i||² (B, E), fp64
    origins: Tensor  # q_i(0) (B, E), fp64

    @classmethod
    def of(cls, deltas: Tensor, precisions: Tensor | None, _: int, pieces: int = 1) -> Self:
        """Forms of the updates A (B, E, O, I), whose pieces never share a precision."""
        assert pieces == 1
        given = None if precisions is None else precisions.to(deltas)
        targets = deltas if given is None else given * deltas
        return cls(
            targets=targets,
            precisions=given,
            norms=linalg.pairwise(deltas, deltas),
            origins=linalg.pairwise(deltas, targets),
        )

    @property
    def speaks(self) -> Tensor:
        """True (B, E) where P_i is not zero."""
        if self.precisions is None:
            return torch.ones_like(self.norms, dtype=torch.bool)
        return self.precisions.amax(dim=(-2, -1)) > 0

    def residuals(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """q_i(M) and the size of its terms, (B, E) each, for M (B, O, I)."""
        if self.precisions is None:
            quadratic = linalg.square_norm(merged.flatten(-2)).unsqueeze(-1)
        else:
            quadratic = linalg.inner(self.precisions, merged.square())
        cross = 2 * linalg.inner(self.targets, merged)
        values = (quadratic - cross + self.origins).clamp_min(0)
        return values, quadratic + cross.abs() + self.origins

    def mode(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """The M (B, O, I) of weighted means, entry by entry; 0 where nobody has a say."""
        diagonal, right = self._system(weights, ridge)
        merged = torch.where(diagonal > 0, right / diagonal, 0.0)
        return merged, torch.zeros_like(ridge, dtype=torch.bool)

    def certify(self, merged: Tensor, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """||H M - b|| / ||b|| and the ratio of H's extreme entries, (B,) each."""
        diagonal, right = self._system(weights, ridge)
        miss = torch.linalg.matrix_norm(diagonal * merged - right).double()
        size = torch.linalg.matrix_norm(right).double()
        positive = torch.where(diagonal > 0, diagonal, torch.inf)
        condition = diagonal.amax(dim=(-2, -1)) / positive.amin(dim=(-2, -1))
        return torch.where(size > 0, miss / size, miss), condition.double().clamp_min(1.0)

    def mean_diagonal(self, weights: Tensor) -> Tensor:
        """Mean entry of Σ w_i P_i (B,)."""
        if self.precisions is None:
            return weights.sum(dim=-1)
        means = self.precisions.mean(dim=(-2, -1), dtype=torch.float64)
        return (weights * means).sum(dim=-1)

    def pulls(self, merged: Tensor) -> Tensor:
        """P_i ⊙ (M - A_i) (B, E, O, I)."""
        own = merged.unsqueeze(1)
        return (own if self.precisions is None else self.precisions * own) - self.targets

    def root(self, weights: Tensor, ridge: Tensor) -> DiagonalRoot:
        """1 / √H, entry by entry."""
        diagonal, _ = self._system(weights, ridge)
        return DiagonalRoot(torch.where(diagonal > 0, diagonal.rsqrt(), 0.0))

    def _system(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """Diagonal of H, (B, O, I) or (B, 1, 1), and b (B, O, I)."""
        alpha = weights.to(self.targets)
        right = torch.einsum("be,beij->bij", alpha, self.targets)
        if self.precisions is None:
            diagonal = alpha.sum(dim=-1)[:, None, None]
        else:
            diagonal = torch.einsum("be,beij->bij", alpha, self.precisions)
        return diagonal + ridge.to(right)[:, None, None], right
