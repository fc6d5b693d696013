"""Residual forms whose precision is a matrix on one side: the experts' grams, or activations.

    q_i(M) = <M - A_i, P_i (M - A_i)>,  P_i (O, O);  gram: P_i = A_i A_iᵀ (docs/family.md)

One M Mᵀ serves all experts: q_i = <P_i, M Mᵀ> - 2 <P_i A_i, M> + <A_i, P_i A_i>.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.systems import OneAxis


@dataclass(frozen=True)
class OneSided(OneAxis):
    """Forms of E experts for B·N matrices, N pieces of a matrix sharing its precisions.

    The batch axis of everything but precisions and traces counts pieces: (B·N, ...). Targets are
    held transposed: in the order of columns, which is how systems are solved.
    """

    precisions: Tensor  # P_i (B, E, O, O)
    targets: Tensor  # (P_i A_i)ᵀ (B·N, E, I, O)
    norms: Tensor  # ||A_i||² (B·N, E), fp64
    origins: Tensor  # q_i(0) = <A_i, P_i A_i> (B·N, E), fp64
    traces: Tensor  # tr P_i (B, E), fp64
    dimension: int  # O of the whole matrices, of which these may be coordinates in a subspace

    @classmethod
    def of_grams(cls, deltas: Tensor, _: None, dimension: int, pieces: int = 1) -> Self:
        """P_i = A_i A_iᵀ, for updates (B, E, O, I) or their coordinates; cut along I in pieces."""
        grams = deltas @ deltas.mT
        rows, columns = deltas.shape[-2:]
        # Two products with an I × I matrix are cheaper than one with O × O where A is tall.
        tall = 2 * columns < rows
        targets = (deltas.mT @ deltas) @ deltas.mT if tall else deltas.mT @ grams
        if pieces > 1:
            return cls._of(grams, targets, deltas, dimension, pieces)
        # ||A||² is the gram's trace, and q(0) = <A, G A> its squared norm: no pass over A.
        traces, squares = _trace(grams), linalg.square_norm(grams.flatten(-2))
        return cls(grams, targets, traces, squares, traces, dimension)

    @classmethod
    def of_activations(
        cls, deltas: Tensor, activations: Tensor, dimension: int, pieces: int = 1
    ) -> Self:
        """P_i given (B, E, O, O)."""
        given = activations.to(deltas)
        return cls._of(given, deltas.mT @ given, deltas, dimension, pieces)

    @classmethod
    def _of(
        cls, precisions: Tensor, targets: Tensor, deltas: Tensor, dimension: int, pieces: int
    ) -> Self:
        own, targets = _cut(deltas.mT, pieces), _cut(targets, pieces)
        return cls(
            precisions=precisions,
            targets=targets,
            norms=linalg.pairwise(own, own),
            origins=linalg.pairwise(own, targets).clamp_min(0),
            traces=_trace(precisions),
            dimension=dimension,
        )

    @property
    def speaks(self) -> Tensor:
        """True (B·N, E) where P_i is not zero: the others decide the rest alone."""
        return (self.traces > 0).repeat_interleave(self.pieces, dim=0)

    @property
    def pieces(self) -> int:
        """Pieces N per matrix."""
        return self.targets.shape[0] // self.precisions.shape[0]

    def residuals(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """q_i(M) and the size of its terms, (B·N, E) each, for M (B·N, O, I)."""
        outer = (merged @ merged.mT).unflatten(0, (-1, self.pieces))
        by_piece = [linalg.inner(self.precisions, outer[:, n]) for n in range(self.pieces)]
        quadratic = torch.stack(by_piece, dim=1).flatten(0, 1)
        cross = 2 * linalg.inner(self.targets, merged.mT)
        values = (quadratic - cross + self.origins).clamp_min(0)
        return values, quadratic.abs() + cross.abs() + self.origins

    def pulls(self, merged: Tensor) -> Tensor:
        """P_i (M - A_i) (B·N, E, O, I)."""
        precisions = self.precisions.repeat_interleave(self.pieces, dim=0)
        return precisions @ merged.unsqueeze(1) - self.targets.mT

    def system(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """H = Σ α_i P_i + λ I (B·N, O, O), b = Σ α_i P_i A_i (B·N, O, I); α (B·N, E), λ (B·N,)."""
        alpha = weights.to(self.targets)
        by_matrix = alpha.unflatten(0, (-1, self.pieces))
        matrix = torch.einsum("bne,beij->bnij", by_matrix, self.precisions).flatten(0, 1)
        matrix.diagonal(dim1=-2, dim2=-1).add_(ridge.to(matrix).unsqueeze(-1))
        return matrix, torch.einsum("be,beij->bij", alpha, self.targets).mT

    def mean_diagonal(self, weights: Tensor) -> Tensor:
        """tr(Σ w_i P_i) / O (B·N,)."""
        traces = self.traces.repeat_interleave(self.pieces, dim=0)
        return (weights * traces).sum(dim=-1) / self.dimension


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)


def _cut(tensor: Tensor, pieces: int) -> Tensor:
    """(B, E, N·I, O) → (B·N, E, I, O)."""
    if pieces == 1:
        return tensor
    return tensor.unflatten(-2, (pieces, -1)).movedim(2, 1).flatten(0, 1)
