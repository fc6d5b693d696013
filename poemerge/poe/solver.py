"""Solve a batch of matrices in as many digits as it takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poemerge.errors import NumericalError
from poemerge.poe.certificate import Certificate, certify
from poemerge.poe.experts import PRECISIONS, Form, Tail
from poemerge.poe.inference import Stop, solve
from poemerge.poe.settings import ProductSettings
from poemerge.task_vector import StreamedStack

SMALL = 256  # rows of a system that is solved in fp64 at once: it costs next to nothing
PROBE_RIDGE = 1e-2  # relative, of the Gaussian mode at which residuals are measured

Updates = Tensor | StreamedStack
Measure = Callable[[], Tensor]
TailOf = Callable[[Form, Tensor, Measure], Tail]


@dataclass(frozen=True)
class Energy:
    """What the experts' disagreement costs, and when to stop looking for the least.

    Attributes:
        settings: precision, side, ridge.
        tail_of: builds the tail from the forms, the trust (B, E) in the experts, and a function
            that measures their relative residuals q_i / q_i(0) (B, E) at the Gaussian mode.
        stop: when a heavy-tailed solve ends.
    """

    settings: ProductSettings
    tail_of: TailOf
    stop: Stop


@dataclass(frozen=True)
class Problem:
    """A batch of matrices to solve.

    Attributes:
        deltas: updates (B, E, O, N·I), or their coordinates in a joint space; a stream of those
            of one matrix (E, O, I) where they are too many to hold.
        curvature: as in `Call`, or None.
        weights: say of the experts (B, E).
        dimension: O of the whole matrices.
        pieces: N, into which I is cut.
        seeds: of what is drawn at random, one a matrix; none if nothing is.
    """

    deltas: Updates
    curvature: Tensor | None
    weights: Tensor
    dimension: int
    pieces: int = 1
    seeds: tuple[int, ...] = ()

    def one(self, index: int) -> "Problem":
        """One matrix of the batch, with its pieces, in fp64."""
        if isinstance(self.deltas, StreamedStack):
            return self.double()
        own = slice(index, index + 1)
        given = None if self.curvature is None else self.curvature[own]
        deltas = self.deltas[own].double()
        return Problem(deltas, given, self.weights[own], self.dimension, self.pieces)

    def double(self) -> "Problem":
        """The same in fp64."""
        return replace(self, deltas=self.deltas.double())


@dataclass(frozen=True)
class Density:
    """p(M) ∝ Π exp(-E_i(M)) · exp(-λ/2 ||M||²) of a batch; axes as in experts.py.

    Attributes:
        form: the experts' residual forms.
        tail: their cost.
        start: weights (B, E) of the Gaussian mode to start from.
        ridge: λ (B,).
    """

    form: Form
    tail: Tail
    start: Tensor
    ridge: Tensor


def solve_matrices(energy: Energy, problem: Problem) -> tuple[Tensor, list[Certificate]]:
    """The modes M (B·N, O, I), and a certificate for each.

    Large matrices in fp32 are solved in fp32, and again in fp64 where that leaves too few digits.

    Raises:
        NumericalError: a system has no unique solution, even in fp64.
    """
    if not PRECISIONS[energy.settings.precision].matrices:
        return _attempt(energy, problem)
    if problem.deltas.shape[-2] <= SMALL:
        problem = problem.double()
    merged, certificates = _attempt(energy, problem)
    if problem.deltas.dtype != torch.float64:
        weak = {i // problem.pieces for i, c in enumerate(certificates) if not c.is_trusted}
        for index in sorted(weak):
            own = slice(index * problem.pieces, (index + 1) * problem.pieces)
            exact, certificates[own] = _attempt(energy, problem.one(index))
            merged[own] = exact.to(merged)
    if any(certificate.has_failed for certificate in certificates):
        raise NumericalError(
            "A merge system is not positive definite even in fp64; raise the setting `ridge`."
        )
    return merged, certificates


def _attempt(energy: Energy, problem: Problem) -> tuple[Tensor, list[Certificate]]:
    """One solve in the dtype of the updates."""
    posed = pose(energy, problem)
    mode = solve(posed.form, posed.tail, posed.start, posed.ridge, energy.stop)
    return mode.merged, certify(posed.form, mode, posed.ridge)


def pose(energy: Energy, problem: Problem) -> Density:
    """The density whose mode is sought, in the dtype of the updates."""
    settings, pieces = energy.settings, problem.pieces
    form = PRECISIONS[settings.precision].form(
        problem.deltas, problem.curvature, problem.dimension, pieces
    )
    weights = problem.weights.to(form.norms).repeat_interleave(pieces, dim=0)
    trust = weights * form.speaks
    if settings.balance == "norm":
        trust = torch.where(form.norms > 0, trust / form.norms, 0.0)
    tail = energy.tail_of(form, trust, lambda: _relative_residuals(form, trust))
    return Density(form, tail, *_start_and_ridge(form, tail, settings))


def _start_and_ridge(form: Form, tail: Tail, settings: ProductSettings) -> tuple[Tensor, Tensor]:
    """Weights (B, E) of the Gaussian mode to start from, and λ (B,).

    The relative ridge is fixed at the weights that the experts have at M = 0
    (docs/scale-and-ridge.md), and the equal weights of the start are on the same footing.
    """
    reference = tail.weights(form.origins)
    voting = (reference > 0).to(reference)
    if settings.ridge_mode == "absolute":
        ridge, equal = torch.full_like(reference[:, 0], settings.ridge), voting
    else:
        ridge = settings.ridge * form.mean_diagonal(reference)
        count = voting.sum(dim=-1, keepdim=True).clamp_min(1)
        equal = voting * reference.sum(dim=-1, keepdim=True) / count
    ridge = torch.where(voting.any(dim=-1), ridge, torch.ones_like(ridge))
    return (equal if tail.is_robust else reference), ridge


def _relative_residuals(form: Form, trust: Tensor) -> Tensor:
    """q_i / q_i(0) (B, E) at the Gaussian mode to which every expert brings the same precision."""
    size = torch.where(form.origins > 0, form.origins, 1.0)
    weights = trust * (form.origins > 0) / size
    ridge = PROBE_RIDGE * form.mean_diagonal(weights)
    merged, _ = form.mode(weights, torch.where(ridge > 0, ridge, 1.0))
    return form.residuals(merged)[0] / size
