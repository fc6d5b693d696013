"""Anderson mixing of a fixed-point iteration x → g(x), for a batch of small vectors.

Walker and Ni 2011, SIAM J. Numer. Anal. 49(4), type II: of the last steps, the combination whose
residuals g - x cancel best is continued.
"""

import torch
from torch import Tensor

MEMORY = 5  # earlier steps that are combined; no more than the vectors have entries
DAMPING = 1e-10  # of the least squares, relative to its trace


class Anderson:
    """The memory of a batch of iterations; each forgets by itself when told that a step failed.

    Args:
        start: first x (B, E), fp64.
    """

    def __init__(self, start: Tensor) -> None:
        batch, size = start.shape
        depth = min(MEMORY, size)
        self._images = start.new_zeros(batch, depth, size)  # differences of g
        self._misses = start.new_zeros(batch, depth, size)  # differences of g - x
        self._last: tuple[Tensor, Tensor] | None = None
        self._valid = torch.zeros(batch, dtype=torch.bool, device=start.device)
        self._turn = 0

    def next(self, used: Tensor, asked: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
        """The x to try next, and where (B,) it is just g.

        Args:
            used: x (B, E) of the best step so far.
            asked: g(x) (B, E).
            better: True (B,) where this x is new; elsewhere the step failed and all is forgotten.
        """
        miss = asked - used
        if self._last is not None:
            row = self._turn % self._images.shape[1]
            known = (better & self._valid).unsqueeze(-1)
            self._images[:, row] = torch.where(known, asked - self._last[0], 0.0)
            self._misses[:, row] = torch.where(known, miss - self._last[1], 0.0)
            self._turn += 1
            keep = better.view(-1, 1, 1)
            self._images, self._misses = self._images * keep, self._misses * keep
        # After a failure the best x is tried plainly; what follows it starts a new memory.
        self._last, self._valid = (asked, miss), torch.ones_like(better)
        mixed = asked - self._mix(miss)
        plain = ~better | (self._misses == 0).all(dim=-1).all(dim=-1)
        return torch.where(plain.unsqueeze(-1), asked, mixed), plain

    def _mix(self, miss: Tensor) -> Tensor:
        """The part (B, E) of g that the memory explains away."""
        matrix = self._misses @ self._misses.mT
        scale = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(torch.finfo().tiny)
        matrix.diagonal(dim1=-2, dim2=-1).add_((DAMPING * scale).unsqueeze(-1))
        factor, _ = torch.linalg.cholesky_ex(matrix)
        right = self._misses @ miss.unsqueeze(-1)
        return (torch.cholesky_solve(right, factor).mT @ self._images).squeeze(-2)
