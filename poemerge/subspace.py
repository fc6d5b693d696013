"""The joint space of low-rank experts, in which they are solved exactly.

With U, V orthonormal bases of the stacked factors, every expert is A_i = U Ã_i Vᵀ and so is the
mode, M = U X Vᵀ: all inner products are the same in the small coordinates (docs/maths.md,
section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class JointSpace:
    """Orthonormal bases of all experts' columns and rows, and the experts' coordinates in them."""

    columns: Tensor  # U (B, O, K), K ≤ Σ R_i
    rows: Tensor  # V (B, I, K')
    coordinates: Tensor  # Ã (B, E, K, K')

    @classmethod
    def of(cls, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Self:
        """Build the space of A_i = up_i · down_i by two thin QR factorisations in fp64.

        Args:
            ups: E tensors (B, O, R_i).
            downs: E tensors (B, R_i, I).
        """
        ranks = [up.shape[-1] for up in ups]
        columns, left = torch.linalg.qr(torch.cat(list(ups), dim=-1).double())
        rows, right = torch.linalg.qr(torch.cat(list(downs), dim=-2).double().mT)
        parts = zip(left.split(ranks, dim=-1), right.split(ranks, dim=-1), strict=True)
        return cls(columns, rows, torch.stack([a @ b.mT for a, b in parts], dim=1))

    def factors(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Lift X (B, K, K') to the factors of U X Vᵀ, the smaller side taking X."""
        if inner.shape[-2] <= inner.shape[-1]:
            return self.columns, inner @ self.rows.mT
        return self.columns @ inner, self.rows.mT
