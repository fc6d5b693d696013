"""An expert's energy: how far the merged update M may be from it, and how much that costs.

Two independent choices (docs/maths.md, sections 1 and 2; Bui et al., arXiv 2607.01689):

    precision   which disagreement counts: q_i(M) = <M - A_i, G_i (M - A_i)>, G_i = A_i A_iᵀ
    tail        what it costs:             E_i(M) = φ(q_i(M)), and its weight α_i = 2 φ'(q_i)

Everything is batched: B matrices of one shape, E experts. Scalars are kept in fp64, since the terms
of q_i cancel.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from poemerge import linalg


class Tail(Protocol):
    """The cost φ of a squared residual; concave in q, so reweighting never raises the energy."""

    def energy(self, residuals: Tensor) -> Tensor:
        """E_i for q_i; both (B, E)."""

    def weights(self, residuals: Tensor) -> Tensor:
        """α_i = 2 φ'(q_i); both (B, E)."""


@dataclass(frozen=True)
class Gaussian:
    """E = ½ w q, weight w: the residual counts by its square, however large."""

    trust: Tensor  # w (B, E)

    def energy(self, residuals: Tensor) -> Tensor:
        """½ w q."""
        return 0.5 * self.trust * residuals

    def weights(self, residuals: Tensor) -> Tensor:  # noqa: ARG002
        """The trust itself, whatever M."""
        return self.trust


@dataclass(frozen=True)
class Cauchy:
    """E = ½ w log(γ² + q), weight w / (γ² + q): far-off experts lose their say."""

    trust: Tensor  # w (B, E)
    scale: Tensor  # γ² (B, E), positive

    def energy(self, residuals: Tensor) -> Tensor:
        """½ w log(γ² + q)."""
        return 0.5 * self.trust * torch.log(self.scale + residuals)

    def weights(self, residuals: Tensor) -> Tensor:
        """Weight w / (γ² + q)."""
        return self.trust / (self.scale + residuals)


@dataclass(frozen=True)
class Grams:
    """The residual forms of E experts for B matrices, each measured along its own columns."""

    grams: Tensor  # G_i = A_i A_iᵀ (B, E, O, O)
    targets: Tensor  # G_i A_i (B, E, O, I)
    origins: Tensor  # q_i(0) = ||G_i||² (B, E), fp64
    norms: Tensor  # ||A_i||² (B, E), fp64
    dimension: int  # O of the whole matrices, of which these may be coordinates in a subspace

    @classmethod
    def of(cls, deltas: Tensor, dimension: int | None = None) -> Self:
        """Build the forms from the updates A (B, E, O, I), or from their coordinates."""
        grams = deltas @ deltas.mT
        return cls(
            grams=grams,
            targets=grams @ deltas,
            origins=_inner(grams, grams),
            norms=_inner(deltas, deltas),
            dimension=dimension or deltas.shape[-2],
        )

    def residuals(self, merged: Tensor) -> Tensor:
        """q_i(M) (B, E) in fp64 for M (B, O, I), from one M Mᵀ for all experts."""
        outer = (merged @ merged.mT).unsqueeze(1)
        quadratic = _inner(self.grams, outer)
        cross = _inner(self.targets, merged.unsqueeze(1))
        return (quadratic - 2 * cross + self.origins).clamp_min(0)

    def system(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """H = Σ α_i G_i + λ I (B, O, O) and b = Σ α_i G_i A_i (B, O, I) for α (B, E), λ (B,)."""
        alpha = weights.to(self.grams)
        matrix = torch.einsum("be,beij->bij", alpha, self.grams)
        matrix.diagonal(dim1=-2, dim2=-1).add_(ridge.to(matrix).unsqueeze(-1))
        return matrix, torch.einsum("be,beij->bij", alpha, self.targets)

    def mode(self, weights: Tensor, ridge: Tensor) -> Tensor:
        """The M (B, O, I) that solves H M = b."""
        matrix, right = self.system(weights, ridge)
        return linalg.solve(linalg.cholesky(matrix), right)

    def mean_diagonal(self, weights: Tensor) -> Tensor:
        """tr(Σ w_i G_i) / O (B,), the unit of a relative ridge; tr G_i = ||A_i||²."""
        return (weights * self.norms).sum(dim=-1) / self.dimension


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius products over the last two axes, summed in fp64."""
    return (left * right).sum(dim=(-2, -1), dtype=torch.float64)
