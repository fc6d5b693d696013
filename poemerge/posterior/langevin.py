"""A Metropolis-adjusted Langevin sampler (MALA): exact, whatever the shape of the density.

Roberts and Tweedie 1996, Bernoulli 2(4); the step and its rate of acceptance after Roberts and
Rosenthal 1998, JRSS B 60(1). Pure functions of a state and of random numbers, for B chains at once;
the positions are meant to be whitened, so that one step fits all directions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TARGET = 0.574  # rate of acceptance at which high dimensions are crossed fastest
DECAY = 0.6  # of the adaptation: fast enough to settle, slow enough to get there

Potential = Callable[[Tensor], tuple[Tensor, Tensor]]  # U (B, *shape) → U's value (B,), gradient


@dataclass(frozen=True)
class State:
    """Where the chains are.

    Attributes:
        position: (B, *shape).
        potential: minus the log density there (B,), fp64, up to a constant.
        gradient: of the potential (B, *shape).
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Info:
    """What a step did.

    Attributes:
        probability: of acceptance (B,).
        accepted: True (B,) where the chain moved.
    """

    probability: Tensor
    accepted: Tensor


def init(potential: Potential, position: Tensor) -> State:
    """The chains at `position` (B, *shape)."""
    return State(position, *potential(position))


def step(
    potential: Potential, state: State, size: Tensor, white: Tensor, uniform: Tensor
) -> tuple[State, Info]:
    """One step of every chain.

    Args:
        potential: of the target.
        state: before the step.
        size: ε (B,): propose x - ε²/2 ∇U(x) + ε z.
        white: z (B, *shape), standard normal.
        uniform: (B,), between 0 and 1: decides on acceptance.
    """
    wide = _like(size, white)
    proposed = init(potential, state.position - wide**2 / 2 * state.gradient + wide * white)
    back = state.position - proposed.position + wide**2 / 2 * proposed.gradient
    ratio = state.potential - proposed.potential
    ratio = ratio + _half_square(white) - _half_square(back / wide)
    probability = ratio.nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp_max(0).exp()
    accepted = uniform < probability
    return _choose(accepted, proposed, state), Info(probability, accepted)


def first_size(dimension: int) -> float:
    """ε that is about right for a standard normal target of that dimension."""
    return 1.65 * dimension ** (-1 / 6)


def adapt(size: Tensor, info: Info, turn: int) -> Tensor:
    """ε (B,) after step `turn` (from 0) of the burn-in: larger where too much was accepted."""
    return size * torch.exp((info.probability - TARGET) * (turn + 1) ** -DECAY)


def _choose(accepted: Tensor, new: State, old: State) -> State:
    return State(
        torch.where(_like(accepted, new.position), new.position, old.position),
        torch.where(accepted, new.potential, old.potential),
        torch.where(_like(accepted, new.gradient), new.gradient, old.gradient),
    )


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """(B,) → (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (tensor.ndim - 1))


def _half_square(tensor: Tensor) -> Tensor:
    return 0.5 * tensor.flatten(1).square().sum(dim=-1)
