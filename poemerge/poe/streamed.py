"""Grams of experts that are too many to hold at once: each is formed anew whenever it is needed.

    q_i(M) = ||A_iᵀ (M - A_i)||²

A reweighting step passes twice over the experts, once to add up the system and once for the
residuals; the answer is that of onesided.py, and the memory that of one expert. A residual is the
square of a difference here, and not a difference of squares: few of its digits cancel.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.systems import OneAxis
from poemerge.task_vector import StreamedStack


@dataclass(frozen=True)
class StreamedGrams(OneAxis):
    """Forms of E experts for one matrix, P_i = A_i A_iᵀ; B is 1."""

    stack: StreamedStack
    norms: Tensor  # ||A_i||² (1, E), fp64
    origins: Tensor  # q_i(0) = ||A_iᵀ A_i||² (1, E), fp64
    dimension: int

    @classmethod
    def of(cls, stack: StreamedStack, dimension: int) -> Self:
        """One pass over the experts."""
        norms, origins = [], []
        for delta in stack.each():
            norms.append(linalg.square_norm(delta.flatten()))
            origins.append(linalg.square_norm(_smaller_gram(delta).flatten()))
        return cls(stack, torch.stack(norms)[None], torch.stack(origins)[None], dimension)

    @property
    def speaks(self) -> Tensor:
        """True (1, E) where A_i is not zero."""
        return self.norms > 0

    def residuals(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """q_i(M) and what its rounding is a part of, (1, E) each, for M (1, O, I)."""
        found = [_residual(delta, merged[0] - delta) for delta in self.stack.each()]
        values = torch.stack(found)[None]
        root = (values * self.origins).sqrt()  # of M - A_i: |Aᵀ M| + |Aᵀ A| ≤ √q + 2 √q(0)
        return values, 3 * values + 4 * root

    def system(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """H and b, one expert after the other."""
        rows, columns = self.stack.shape
        matrix = torch.zeros(rows, rows, dtype=self.stack.dtype, device=weights.device)
        right = matrix.new_zeros(rows, columns)
        for share, delta in zip(weights[0].tolist(), self.stack.each(), strict=True):
            gram = delta @ delta.mT
            matrix.add_(gram, alpha=share)
            right.addmm_(gram, delta, alpha=share)
        matrix.diagonal().add_(ridge.to(matrix))
        return matrix[None], right[None]

    def pulls(self, merged: Tensor) -> Tensor:
        """P_i (M - A_i) (1, E, O, I), all of them at once."""
        found = [delta @ (delta.mT @ (merged[0] - delta)) for delta in self.stack.each()]
        return torch.stack(found)[None]

    def mean_diagonal(self, weights: Tensor) -> Tensor:
        """tr(Σ w_i P_i) / O (1,)."""
        return (weights * self.norms).sum(dim=-1) / self.dimension


def _residual(delta: Tensor, gap: Tensor) -> Tensor:
    """||Aᵀ D||² in fp64, over the smaller of two products."""
    rows, columns = delta.shape
    if columns <= 2 * rows:
        return linalg.square_norm((delta.mT @ gap).flatten())
    return linalg.pairwise(delta @ delta.mT, gap @ gap.mT)


def _smaller_gram(delta: Tensor) -> Tensor:
    """A Aᵀ or Aᵀ A, whose norms are the same."""
    return delta @ delta.mT if delta.shape[0] <= delta.shape[1] else delta.mT @ delta
