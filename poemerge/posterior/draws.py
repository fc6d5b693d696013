"""Draws from the posterior of a batch of matrices, by Laplace's approximation or by Langevin."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.method import Sampling
from poemerge.poe.solver import Density
from poemerge.posterior import langevin
from poemerge.posterior.laplace import Laplace, laplace

BURN_IN = 10  # in units of D^(1/3), the steps that MALA takes to cross D dimensions
APART = 2  # likewise, between two draws


@dataclass(frozen=True)
class Fact:
    """What is known of one piece of a matrix.

    Attributes:
        variance: E ||M - M*||² at temperature 1.
        size: ||M*||².
        acceptance: rate of the Langevin sampler; None for Laplace.
    """

    variance: float
    size: float
    acceptance: float | None


@dataclass(frozen=True)
class Drawn:
    """The posterior of a batch: a fact on each matrix, and draws (B, O, I) without end."""

    facts: tuple[Fact, ...]
    draws: Iterator[Tensor]


class Noise:
    """Random numbers of B matrices from seeds of their own, whatever the batch and the device.

    Args:
        seeds: one or more matrices in turn share one.
        like: (B, O, I).
    """

    def __init__(self, seeds: Sequence[int], like: Tensor) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._like = like
        self._shape = (len(like) // len(seeds), *like.shape[1:])

    def normal(self) -> Tensor:
        """Standard normal, (B, O, I)."""
        return self._each(lambda g: torch.randn(self._shape, generator=g, dtype=torch.float64))

    def uniform(self) -> Tensor:
        """Between 0 and 1, (B,)."""
        return self._each(lambda g: torch.rand(self._shape[0], generator=g, dtype=torch.float64))

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.cat([draw(generator) for generator in self._generators]).to(self._like)


def posterior_of(density: Density, mode: Tensor, seeds: Sequence[int], sampling: Sampling) -> Drawn:
    """The posterior around the mode (B, O, I) of a density, both in fp64."""
    found = laplace(density, mode, sampling.temperature)
    noise = Noise(seeds, mode)
    rates: Sequence[float | None] = [None] * len(mode)
    if sampling.sampler == "langevin":
        draws, rate = _langevin(density, found, noise)
        rates = rate.tolist()
    else:
        draws = _laplace(found, noise)
    variances = found.variances().sum(dim=(-2, -1)) / sampling.temperature
    sizes = linalg.square_norm(mode.flatten(-2))
    each = zip(variances.tolist(), sizes.tolist(), rates, strict=True)
    return Drawn(tuple(Fact(*one) for one in each), draws)


def summarise(pieces: Sequence[Fact]) -> Mapping[str, float]:
    """`relative_std` = √E||M - M*||² / ||M*|| of a matrix at temperature 1, 0 if M* is 0."""
    size = sum(piece.size for piece in pieces)
    variance = sum(piece.variance for piece in pieces)
    facts = {"relative_std": (variance / size) ** 0.5 if size > 0 else 0.0}
    rates = [piece.acceptance for piece in pieces if piece.acceptance is not None]
    return facts | ({"acceptance": fmean(rates)} if rates else {})


def _laplace(found: Laplace, noise: Noise) -> Iterator[Tensor]:
    while True:
        yield found.mode + found.noise(noise.normal())


def _langevin(density: Density, found: Laplace, noise: Noise) -> tuple[Iterator[Tensor], Tensor]:
    """Draws of chains that start at one of Laplace's, and their rate of acceptance (B,)."""
    potential = whitened(density, found)
    state = langevin.init(potential, noise.normal())
    crossing = max(10, round(found.mode[0].numel() ** (1 / 3)))
    size = torch.full_like(state.potential, langevin.first_size(found.mode[0].numel()))

    def walk(state: langevin.State, size: Tensor) -> tuple[langevin.State, langevin.Info]:
        return langevin.step(potential, state, size, noise.normal(), noise.uniform())

    for turn in range(BURN_IN * crossing):
        state, info = walk(state, size)
        size = langevin.adapt(size, info, turn)
    rate = torch.zeros_like(size)
    for _ in range(BURN_IN * crossing):  # with the size settled: what was adapted is no chain
        state, info = walk(state, size)
        rate = rate + info.accepted / (BURN_IN * crossing)

    def draws(state: langevin.State) -> Iterator[Tensor]:
        while True:
            for _ in range(APART * crossing):
                state, _ = walk(state, size)
            yield found.mode + found.noise(state.position)

    return draws(state), rate


def whitened(density: Density, found: Laplace) -> langevin.Potential:
    """F(M) / τ as a function of Z, where M = M* + √τ K^(-½) Z; near ½ ||Z||² at the mode."""
    form, tail, ridge = density.form, density.tail, density.ridge
    unit = found.variance.clamp_min(torch.finfo(found.variance.dtype).tiny)

    def energy(merged: Tensor) -> tuple[Tensor, Tensor]:
        residuals, _ = form.residuals(merged)
        prior = 0.5 * ridge * linalg.square_norm(merged.flatten(-2))
        return tail.energy(residuals).sum(dim=-1) + prior, tail.weights(residuals)

    least, _ = energy(found.mode)

    def potential(white: Tensor) -> tuple[Tensor, Tensor]:
        merged = found.mode + found.noise(white)
        value, weights = energy(merged)
        pull = torch.einsum("be,beij->bij", weights, form.pulls(merged))
        gradient = pull + ridge[:, None, None] * merged
        return (value - least) / unit, found.pull_back(gradient) / unit[:, None, None]

    return potential
