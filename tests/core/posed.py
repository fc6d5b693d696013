"""Small posed problems for the tests of posteriors: updates, tails, a density and its mode."""

import torch
from torch import Tensor

from poemerge.methods.cauchy_poe import Cauchy
from poemerge.methods.gaussian_poe import Gaussian
from poemerge.methods.student_t_poe import StudentT
from poemerge.poe.entrywise import Entrywise
from poemerge.poe.experts import Tail
from poemerge.poe.inference import Stop, solve
from poemerge.poe.onesided import OneSided
from poemerge.poe.solver import Density
from poemerge.posterior.laplace import Laplace
from tests.core.stacks import dense, pair

ROWS, COLUMNS, EXPERTS = 4, 3, 3
RIDGE = 0.3
STOP = Stop(5000, 1e-13)


def scale_of(deltas: Tensor) -> Tensor:
    """Scales of heavy tails (1, E): a fifth of ||A_i A_iᵀ||²."""
    return 0.2 * (deltas @ deltas.mT).square().sum(dim=(-2, -1))


def tail(name: str, deltas: Tensor) -> Tail:
    """A tail by its name, with experts of unequal trust."""
    trust = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)[:, : deltas.shape[1]]
    if name == "gaussian":
        return Gaussian(trust)
    if name == "cauchy":
        return Cauchy(trust, scale_of(deltas))
    return StudentT(trust, scale_of(deltas), torch.full((1, 1), 4.0, dtype=torch.float64))


def updates(scale: float = 1.0, seed: int = 0) -> Tensor:
    """(1, E, O, I)."""
    return dense([pair(ROWS, 3, COLUMNS, seed + s) for s in range(EXPERTS)]).dense() * scale


def fisher(deltas: Tensor) -> Tensor:
    """Diagonal precisions for these updates, none of them 0."""
    return deltas.flip(1).square() + 0.1


def posed(kind: str, name: str, deltas: Tensor, ridge: float = RIDGE) -> tuple[Density, Tensor]:
    """A density over one matrix, and its mode (1, O, I)."""
    if kind == "gram":
        form = OneSided.of_grams(deltas, None, deltas.shape[-2])
    else:
        form = Entrywise.of(deltas, fisher(deltas), 0)
    cost = tail(name, deltas)
    start = cost.weights(form.origins)
    density = Density(form, cost, start, torch.full((1,), ridge, dtype=torch.float64))
    return density, solve(form, cost, start, density.ridge, STOP).merged


def matrix_of(found: Laplace) -> Tensor:
    """C with noise(Z) = C vec(Z)."""
    size = found.mode[0].numel()
    columns = torch.eye(size, dtype=torch.float64).reshape(size, 1, *found.mode.shape[1:])
    return torch.stack([found.noise(column).flatten() for column in columns], dim=1)
