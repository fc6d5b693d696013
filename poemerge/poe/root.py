"""Roots L of a system, H = L Lᵀ: white noise in, noise of covariance H⁻¹ out, and back."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Root(Protocol):
    """L of a batch of systems; B matrices (O, I)."""

    def colour(self, white: Tensor) -> Tensor:
        """L⁻ᵀ Z (B, O, I): of covariance H⁻¹ where the entries of Z are independent."""

    def whiten(self, force: Tensor) -> Tensor:
        """L⁻¹ G (B, O, I)."""

    def variances(self, like: Tensor) -> Tensor:
        """The diagonal of H⁻¹ in the shape of `like` (B, O, I): variance of entries of L⁻ᵀ Z."""


@dataclass(frozen=True)
class CholeskyRoot:
    """L of systems that act on the axis O alone."""

    factor: Tensor  # (B, O, O), lower

    def colour(self, white: Tensor) -> Tensor:
        """L⁻ᵀ Z."""
        return torch.linalg.solve_triangular(self.factor.mT, white, upper=True)

    def whiten(self, force: Tensor) -> Tensor:
        """L⁻¹ G."""
        return torch.linalg.solve_triangular(self.factor, force, upper=False)

    def variances(self, like: Tensor) -> Tensor:
        """The diagonal of H⁻¹, the same for every column."""
        unit = torch.eye(self.factor.shape[-1]).to(self.factor)
        inverse = self.whiten(unit.expand_as(self.factor))
        return inverse.square().sum(dim=-2).unsqueeze(-1).expand_as(like)


@dataclass(frozen=True)
class DiagonalRoot:
    """L of systems that take every entry by itself; nothing moves where nobody has a say."""

    inverse: Tensor  # 1 / √H (B, O, I) or (B, 1, 1); 0 where H is 0

    def colour(self, white: Tensor) -> Tensor:
        """L⁻¹ Z."""
        return self.inverse * white

    def whiten(self, force: Tensor) -> Tensor:
        """L⁻¹ G."""
        return self.inverse * force

    def variances(self, like: Tensor) -> Tensor:
        """The diagonal of H⁻¹."""
        return self.inverse.square().expand_as(like)
