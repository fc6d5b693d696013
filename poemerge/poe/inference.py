"""The mode of a product of experts: closed form for Gaussian tails, reweighting for heavy ones.

Majorise-minimise: weights from M, then M from weights. Each step minimises a quadratic that touches
the energy from above, so the energy never rises; the recorded energies are the certificate.

The step is a map of log weights to log weights, which Anderson mixing accelerates. A mixed step
that would raise the energy is thrown away, and a plain one follows; so the promise stands. So is
one that leaps far from the plain step: where there are several modes, it may end in another.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.poe.anderson import Anderson
from poemerge.poe.experts import Form, Tail

LEAP = 0.3  # in log weights, from where a plain step goes; a mixed one goes no farther
SUM_ROUNDING = 8 * torch.finfo(torch.float64).eps  # of an energy, through its own sum
LOOK_EVERY = {"cuda": 4}  # steps between two looks at whether all is settled; each look waits


@dataclass(frozen=True)
class Stop:
    """When to stop: after `max_steps`, or when no weight would change by more than a part `rtol`.

    Where `atol` is positive the published rule holds instead: plain steps, until one moves M by
    less than `atol`.
    """

    max_steps: int
    rtol: float
    atol: float = 0.0


@dataclass
class Mode:
    """The merged updates of a batch and how they were found; axes B and E as in experts.py."""

    merged: Tensor  # M (B, O, I)
    weights: Tensor  # α (B, E), those that M asks for
    steps: Tensor  # (B,), 0 for a closed form
    converged: Tensor  # (B,)
    failed: Tensor  # (B,): H was not positive definite
    noise: Tensor  # (B,): by what part the weights may be off through rounding
    energies: list[Tensor] = field(default_factory=list)  # (B,) at the start and after each step


@dataclass
class _State:
    """Where a batch stands: the best M of each matrix, and the log weights x that gave it."""

    merged: Tensor  # (B, O, I)
    used: Tensor  # x (B, E)
    asked: Tensor  # g (B, E): the log weights that M asks for; x = g at a mode
    energy: Tensor  # (B,)
    noise: Tensor  # (B, E): rounding of g, the part by which α may be off
    slack: Tensor  # (B,): rounding of the energy


def solve(form: Form, tail: Tail, start: Tensor, ridge: Tensor, stop: Stop) -> Mode:
    """Find the mode of p(M) ∝ Π exp(-E_i(M)) · exp(-λ/2 ||M||²) for every matrix of the batch.

    Args:
        form: the experts' residual forms.
        tail: their cost; a Gaussian one is solved in one step.
        start: weights (B, E) of the Gaussian mode to start from.
        ridge: λ (B,), fixed for the whole solve, or the energy would change under its feet.
        stop: when to stop.
    """
    voting = start > 0
    merged, failed = form.mode(start, ridge)
    state = _look(form, tail, merged, _log(start), ridge)
    mixer = Anderson(state.used) if stop.atol == 0 else None
    settled = _settled(state, stop)
    steps = torch.zeros_like(ridge, dtype=torch.int64)
    energies = [state.energy]
    proposal, plain = _propose(state, mixer, torch.ones_like(settled))
    every = LOOK_EVERY.get(ridge.device.type, 1)
    for step in range(stop.max_steps):
        if step % every == 0 and bool(settled.all()):
            break
        merged, broken = form.mode(proposal.exp() * voting, ridge)
        new = _look(form, tail, merged, proposal, ridge)
        better = (new.energy <= state.energy + new.slack) & ~settled & ~broken
        moved = _distance(new.merged, state.merged) if stop.atol > 0 else None
        steps, failed = steps + ~settled, failed | (broken & plain & ~settled)
        # Nothing but rounding can make a plain step rise: there is nowhere lower to go.
        settled = settled | (plain & ~better)
        state = _choose(better, new, state)
        settled = settled | (better & _settled(state, stop, moved))
        energies.append(state.energy)
        proposal, plain = _propose(state, mixer, better)
    return Mode(
        merged=state.merged,
        weights=state.asked.exp() * voting,
        steps=steps,
        converged=settled,
        failed=failed,
        noise=state.noise.amax(dim=-1),
        energies=energies,
    )


def _look(form: Form, tail: Tail, merged: Tensor, used: Tensor, ridge: Tensor) -> _State:
    """Energy of M, the log weights that it asks for, and the rounding of both."""
    residuals, terms = form.residuals(merged)
    prior = 0.5 * ridge * linalg.square_norm(merged.mT.flatten(-2))
    weights = tail.weights(residuals)
    asked = torch.where(weights > 0, _log(weights), used)
    rounding = torch.finfo(merged.dtype).eps * terms  # of q
    shaken = _log(tail.weights(residuals + rounding))
    energy = tail.energy(residuals).sum(dim=-1) + prior
    return _State(
        merged,
        used,
        asked,
        energy,
        noise=torch.where(weights > 0, asked - shaken, 0.0).clamp_min(0),
        slack=2 * (weights * rounding).sum(dim=-1) + SUM_ROUNDING * energy.abs(),
    )


def _settled(state: _State, stop: Stop, moved: Tensor | None = None) -> Tensor:
    """True (B,) where M solves the weights that it asks for, as far as rounding shows."""
    if stop.atol > 0:
        still = state.asked == state.used
        return still.all(dim=-1) if moved is None else moved < stop.atol
    gap = (state.asked - state.used).abs()
    return (gap <= torch.clamp_min(state.noise, stop.rtol)).all(dim=-1)


def _choose(better: Tensor, new: _State, old: _State) -> _State:
    """The new state where it is better, matrix by matrix."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(better.view(-1, *[1] * (a.ndim - 1)), a, b)

    return _State(
        merged=pick(new.merged, old.merged),
        used=pick(new.used, old.used),
        asked=pick(new.asked, old.asked),
        energy=pick(new.energy, old.energy),
        noise=pick(new.noise, old.noise),
        slack=pick(new.slack, old.slack),
    )


def _propose(state: _State, mixer: Anderson | None, better: Tensor) -> tuple[Tensor, Tensor]:
    """The next log weights (B, E), and True (B,) where they are those of a plain step."""
    if mixer is None:
        return state.asked, torch.ones_like(better)
    mixed, plain = mixer.next(state.used, state.asked, better)
    far = (mixed - state.asked).abs().amax(dim=-1) > LEAP
    return torch.where(far.unsqueeze(-1), state.asked, mixed), plain | far


def _distance(new: Tensor, old: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(new - old)


def _log(weights: Tensor) -> Tensor:
    return weights.clamp_min(math.exp(-600)).log()
