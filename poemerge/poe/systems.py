"""What a residual form whose precisions act on one axis can do once its system is known."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.root import CholeskyRoot


class OneAxis(ABC):
    """A form with one system H M = b for all columns of a matrix; axes as in experts.py."""

    dimension: int  # O of the whole matrices, of which these may be coordinates in a subspace

    @abstractmethod
    def system(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """H = Σ α_i P_i + λ I (B, O, O) and b = Σ α_i P_i A_i (B, O, I); α (B, E), λ (B,)."""

    def mode(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """The M (B, O, I) with H M = b; True (B,) where H is not positive definite."""
        matrix, right = self.system(weights, ridge)
        factor, failed = linalg.cholesky(matrix)
        return linalg.solve(factor, right), failed

    def root(self, weights: Tensor, ridge: Tensor) -> CholeskyRoot:
        """The Cholesky factor of H."""
        return CholeskyRoot(linalg.cholesky(self.system(weights, ridge)[0])[0])

    def certify(self, merged: Tensor, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """||H M - b|| / ||b|| and the condition of H, (B,) each."""
        matrix, right = self.system(weights, ridge)
        miss = torch.linalg.matrix_norm(matrix @ merged - right).double()
        size = torch.linalg.matrix_norm(right).double()
        smallest, largest = linalg.extreme_eigenvalues(matrix, linalg.cholesky(matrix)[0])
        if matrix.shape[-1] < self.dimension:
            # Beyond the subspace of the experts λ is the only eigenvalue, if there is a λ.
            smallest = torch.where(ridge > 0, torch.minimum(smallest, ridge), smallest)
        return torch.where(size > 0, miss / size, miss), largest / smallest
