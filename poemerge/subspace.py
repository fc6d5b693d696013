"""The joint space of experts, in which they are solved exactly.

With U, V orthonormal bases of the stacked columns and rows, every expert is A_i = U Ã_i Vᵀ and so
is the mode, M = U X Vᵀ: all inner products are the same in the small coordinates
(docs/low-rank.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def joint_basis(parts: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An orthonormal basis of all columns of all parts, by one thin QR factorisation.

    Args:
        parts: E tensors (B, N, R_i).

    Returns:
        Q (B, N, K) with K = min(N, Σ R_i), and the parts' coordinates Qᵀ part_i (B, K, R_i).
    """
    basis, coordinates = torch.linalg.qr(torch.cat(list(parts), dim=-1))
    return basis, coordinates.split([part.shape[-1] for part in parts], dim=-1)
