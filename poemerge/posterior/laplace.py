"""Laplace's approximation at the mode of a product of experts: exact for Gaussian experts.

The energy F = Σ φ(q_i) + λ/2 ||M||² has at the mode the Hessian (docs/posterior.md)

    K = H - Σ κ_i g_i g_iᵀ       H = Σ α_i P_i + λ,   g_i = P_i (M - A_i),   κ_i = -2 dα_i/dq_i ≥ 0

so a heavy tail takes one direction an expert away from the majoriser H, whose root L the solve has
at hand. With v_i = √κ_i L⁻¹ g_i, K = L (1 - Σ v_i v_iᵀ) Lᵀ: E × E eigenvalues are all it takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.experts import Tail
from poemerge.poe.root import Root
from poemerge.poe.solver import Density

STEP = 1e-5  # relative, of a derivative in fp64
FLATTEST = 0.99  # eigenvalue of Σ v vᵀ that counts; at 1 the mode would be a ridge, and K singular


@dataclass(frozen=True)
class Laplace:
    """M ~ N(M*, τ K⁻¹) for B matrices.

    Attributes:
        mode: M* (B, O, I).
        root: L of the majoriser.
        directions: eigenvectors of Σ v_i v_iᵀ, as long as the roots of the eigenvalues
            (B, E, O, I); none for Gaussian experts.
        slack: those eigenvalues (B, E), below 1; plain reweighting converges at these rates too.
        variance: τ (B,), the unit of the energy.
    """

    mode: Tensor
    root: Root
    directions: Tensor
    slack: Tensor
    variance: Tensor

    def noise(self, white: Tensor) -> Tensor:
        """√τ K^(-½) Z: what to add to the mode, for standard normal Z (B, O, I)."""
        return self._scaled(self.root.colour(self._stretch(white)))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to Z where that with respect to M is given (B, O, I)."""
        return self._scaled(self._stretch(self.root.whiten(gradient)))

    def variances(self) -> Tensor:
        """Variance of every entry of M (B, O, I)."""
        total = self.root.variances(self.mode)
        for direction, slack in zip(self.directions.unbind(1), self.slack.unbind(1), strict=True):
            total = total + self.root.colour(direction).square() / (1 - slack)[:, None, None]
        return self.variance[:, None, None] * total

    def _stretch(self, white: Tensor) -> Tensor:
        """(1 - Σ v vᵀ)^(-½) Z; symmetric."""
        root = (1 - self.slack).sqrt()
        inner = torch.einsum("beij,bij->be", self.directions, white)
        return white + torch.einsum("beij,be->bij", self.directions, inner / (root * (1 + root)))

    def _scaled(self, tensor: Tensor) -> Tensor:
        return self.variance.sqrt()[:, None, None] * tensor


def laplace(density: Density, mode: Tensor, temperature: float = 1.0) -> Laplace:
    """Laplace's approximation at a mode M* (B, O, I) of `density`, in its dtype (fp64).

    Args:
        density: forms, tail and λ.
        mode: from `solve_matrices`.
        temperature: T; τ = T (Σ α_i q_i + λ ||M*||²) / (O I), the noise of the residuals.
    """
    form, tail, ridge = density.form, density.tail, density.ridge
    residuals, _ = form.residuals(mode)
    weights = tail.weights(residuals)
    root = form.root(weights, ridge)
    left = (weights * residuals).sum(dim=-1) + ridge * linalg.square_norm(mode.flatten(-2))
    directions, slack = _directions(density, mode, residuals, root)
    variance = temperature * left / mode[0].numel()
    return Laplace(mode, root, directions, slack, variance)


def _directions(
    density: Density, mode: Tensor, residuals: Tensor, root: Root
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of Σ v_i v_iᵀ times the roots of their eigenvalues, and these."""
    tail = density.tail
    if not tail.is_robust:
        return mode.new_zeros(len(mode), 0, *mode.shape[1:]), mode.new_zeros(len(mode), 0)
    bend = _bend(tail, residuals).sqrt()
    pulls = density.form.pulls(mode).unbind(dim=1)
    taken = torch.stack([root.whiten(pull) for pull in pulls], dim=1) * bend[..., None, None]
    slack, turn = torch.linalg.eigh(torch.einsum("beij,bfij->bef", taken, taken))
    slack = slack.clamp(min=0, max=FLATTEST)
    return torch.einsum("bef,beij->bfij", turn, taken), slack


def _bend(tail: Tail, residuals: Tensor) -> Tensor:
    """κ_i = -2 dα_i/dq_i (B, E), by a central difference in log q.

    g_i shrinks with q_i, so that no eigenvalue is off by more than about 1e-10.
    """
    fall = tail.weights(residuals * (1 - STEP)) - tail.weights(residuals * (1 + STEP))
    return torch.where(residuals > 0, fall / (STEP * residuals), 0.0).clamp_min(0)
