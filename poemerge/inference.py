"""The mode of a product of experts: closed form for Gaussian tails, reweighting for heavy ones.

Majorise-minimise: weights from M, then M from weights. Each step minimises a quadratic that touches
the energy from above, so the energy never rises; the recorded energies are the certificate.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.experts import Grams, Tail


@dataclass(frozen=True)
class Stop:
    """When to stop: after `max_steps`, or when a step moves M by less than a tolerance.

    The tolerance is `rtol` · ||M|| where `atol` is 0, else `atol` alone (the published rule).
    """

    max_steps: int
    rtol: float
    atol: float = 0.0

    def settled(self, new: Tensor, old: Tensor) -> Tensor:
        """True (B,) where the step from `old` to `new` was small enough; both (B, O, I)."""
        change = torch.linalg.matrix_norm(new - old)
        if self.atol > 0:
            return change < self.atol
        return change <= self.rtol * torch.linalg.matrix_norm(new)


@dataclass
class Mode:
    """The merged updates of a batch and what certifies them; axes B and E as in experts.py."""

    merged: Tensor  # M (B, O, I)
    residuals: Tensor  # q_i(M) (B, E)
    weights: Tensor  # α (B, E), those that M solves
    steps: Tensor  # (B,), 0 for a closed form
    converged: Tensor  # (B,)
    energies: list[Tensor] = field(default_factory=list)  # (B,) at the start and after each step
    residual: Tensor = field(default_factory=lambda: torch.empty(0))  # ||H M - b|| / ||b|| (B,)
    condition: Tensor = field(default_factory=lambda: torch.empty(0))  # of H (B,)


def solve(forms: Grams, tail: Tail, start: Tensor, ridge: Tensor, stop: Stop) -> Mode:
    """Find the mode of p(M) ∝ Π exp(-E_i(M)) · exp(-λ/2 ||M||²) for every matrix of the batch.

    Args:
        forms: the experts' residual forms.
        tail: their cost; a Gaussian one is solved in one step.
        start: weights (B, E) of the Gaussian mode to start from.
        ridge: λ (B,), fixed for the whole solve, or the energy would change under its feet.
        stop: when to stop.
    """
    mode = _start(forms, tail, start, ridge)
    while int(mode.steps.max()) < stop.max_steps and not bool(mode.converged.all()):
        _step(mode, forms, tail, ridge, stop)
    return _certify(mode, forms, ridge)


def _start(forms: Grams, tail: Tail, weights: Tensor, ridge: Tensor) -> Mode:
    merged = forms.mode(weights, ridge)
    residuals = forms.residuals(merged)
    return Mode(
        merged=merged,
        residuals=residuals,
        weights=weights,
        steps=torch.zeros_like(ridge, dtype=torch.int64),
        # A Gaussian tail asks for the weights that it started from: the start is the mode.
        converged=(tail.weights(residuals) == weights).all(dim=-1),
        energies=[_energy(tail, merged, residuals, ridge)],
    )


def _step(mode: Mode, forms: Grams, tail: Tail, ridge: Tensor, stop: Stop) -> None:
    """One reweighting of the matrices that have not settled; the others stay as they are."""
    active = ~mode.converged
    weights = tail.weights(mode.residuals)
    merged = forms.mode(weights, ridge)
    settled = stop.settled(merged, mode.merged)
    mode.merged = torch.where(active[:, None, None], merged, mode.merged)
    mode.weights = torch.where(active[:, None], weights, mode.weights)
    mode.residuals = forms.residuals(mode.merged)
    mode.steps = mode.steps + active
    mode.converged = mode.converged | settled
    mode.energies.append(_energy(tail, mode.merged, mode.residuals, ridge))


def _energy(tail: Tail, merged: Tensor, residuals: Tensor, ridge: Tensor) -> Tensor:
    """Σ E_i(M) + λ/2 ||M||² (B,), in fp64."""
    prior = 0.5 * ridge * merged.square().sum(dim=(-2, -1), dtype=torch.float64)
    return tail.energy(residuals).sum(dim=-1) + prior


def _certify(mode: Mode, forms: Grams, ridge: Tensor) -> Mode:
    matrix, right = forms.system(mode.weights, ridge)
    miss = torch.linalg.matrix_norm(matrix @ mode.merged - right)
    size = torch.linalg.matrix_norm(right)
    mode.residual = torch.where(size > 0, miss / size, miss)
    smallest, largest = linalg.extreme_eigenvalues(matrix, linalg.cholesky(matrix))
    if matrix.shape[-1] < forms.dimension:
        # Beyond the subspace of the experts λ is the only eigenvalue, if there is a λ.
        smallest = torch.where(ridge > 0, torch.minimum(smallest.to(ridge), ridge), smallest)
    mode.condition = largest / smallest
    return mode
