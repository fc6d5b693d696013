"""Draws from a posterior, Langevin's above all: they are what integration says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor

from poemerge.method import Sampling
from poemerge.methods.cauchy_poe import Cauchy
from poemerge.poe.inference import solve
from poemerge.poe.onesided import OneSided
from poemerge.poe.solver import Density
from poemerge.posterior import langevin
from poemerge.posterior.draws import Noise, posterior_of
from poemerge.posterior.laplace import laplace
from tests.core.posed import STOP, matrix_of, posed, updates

CHAINS = 250


def many(density: Density, mode: Tensor, count: int) -> tuple[Density, Tensor]:
    """The same density over one matrix many times, for chains side by side."""
    form = density.form
    assert isinstance(form, OneSided)
    names = ("precisions", "targets", "norms", "origins", "traces")
    form = replace(form, **{n: getattr(form, n).expand(count, *[-1] * (getattr(form, n).ndim - 1))
                            for n in names})  # fmt: skip
    return replace(density, form=form, ridge=density.ridge.expand(count)), mode.expand(
        count, -1, -1
    )


@pytest.mark.parametrize("sampler", ["laplace", "langevin"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_of_a_gaussian_product_have_its_mean_and_covariance(sampler: str, seed: int) -> None:
    density, mode = many(*posed("gram", "gaussian", updates()), CHAINS)
    seeds = range(seed * CHAINS, (seed + 1) * CHAINS)
    drawn = posterior_of(density, mode, seeds, Sampling((), sampler))
    samples = torch.cat([draw.flatten(1) for draw in islice(drawn.draws, 16)])
    found = laplace(*posed("gram", "gaussian", updates()))
    mode, expected, count = found.mode, matrix_of(found) @ matrix_of(found).T, len(samples)
    # In units of the true covariance, entries of the empirical one are off by 1/√count or so;
    # what is left of correlation between Langevin draws costs a little more.
    root = torch.linalg.inv(torch.linalg.cholesky(expected))
    white = (samples - mode.flatten()) @ root.T
    noise = 5.5 / count**0.5
    assert float(white.mean(dim=0).abs().max()) < noise
    covariance = white.T @ white / count
    assert float((covariance - torch.eye(len(covariance)).double()).abs().max()) < 1.5 * noise
    rates = [fact.acceptance for fact in drawn.facts if fact.acceptance is not None]
    assert not rates or 0.5 < sum(rates) / CHAINS < 0.7


def chain(potential: langevin.Potential, chains: int, shape: Sequence[int], size: float) -> Tensor:
    """Positions after 400 steps of many chains that start at standard normal ones."""
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, chains, *shape, generator=generator, dtype=torch.float64)
    state = langevin.init(potential, normal())
    for _ in range(400):
        uniform = torch.rand(chains, generator=generator, dtype=torch.float64)
        sizes = torch.full((chains,), size, dtype=torch.float64)
        state, _ = langevin.step(potential, state, sizes, normal(), uniform)
    return state.position


def grid_moments(value: Callable[[Tensor], Tensor], power: int) -> float:
    """E x^power under exp(-value) by the trapezium rule."""
    x = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    weight = torch.exp(-value(x))
    return float(torch.trapezoid(weight * x**power, x) / torch.trapezoid(weight, x))


def test_langevin_samples_a_cauchy_product_as_integration_does() -> None:
    """Scalars 1, 2 and -3, of which a Gaussian would know neither the tails nor the shoulder."""
    targets = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    deltas = targets.reshape(1, 3, 1, 1)
    form = OneSided.of_grams(deltas, None, 1)
    unit = torch.full((1, 3), 2.0, dtype=torch.float64)
    cost = Cauchy(unit, unit)
    ridge = torch.full((1,), 0.2, dtype=torch.float64)
    mode = solve(form, cost, cost.weights(form.origins), ridge, STOP).merged
    density = Density(form, cost, unit, ridge)
    found = laplace(density, mode)

    def value(x: Tensor) -> Tensor:
        miss = (x[:, None] - targets) * targets
        total = torch.log(2 + miss.square()).sum(dim=-1) + 0.1 * x**2
        return total / found.variance[0]

    drawn = posterior_of(*many(density, mode, CHAINS), range(CHAINS), Sampling((), "langevin"))
    samples = torch.cat([draw.flatten() for draw in islice(drawn.draws, 40)])
    mean, square = grid_moments(value, 1), grid_moments(value, 2)
    std = (square - mean**2) ** 0.5
    assert abs(float(samples.mean()) - mean) < 0.05 * std
    assert float(samples.std()) == pytest.approx(std, rel=0.06)
    gaussian = float(found.variances().sqrt())
    assert abs(gaussian / std - 1) > 0.1  # so that Laplace would have failed here
    below = float((samples < 0).double().mean())
    x = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    weight = torch.exp(-value(x))
    expected = float(torch.trapezoid(weight * (x < 0), x) / torch.trapezoid(weight, x))
    assert below == pytest.approx(expected, abs=0.03)


def test_langevin_samples_two_dimensions_as_integration_does() -> None:
    """A banana: U = ½ x² + ½ (y - x²)², which no Gaussian resembles."""

    def banana(place: Tensor) -> tuple[Tensor, Tensor]:
        x, y = place.unbind(dim=-1)
        bend = y - x**2
        return (x**2 + bend**2) / 2, torch.stack([x - 2 * x * bend, bend], dim=-1)

    x, y = chain(banana, 8000, (2,), 0.6).unbind(dim=-1)
    for actual, expected in ((x, 0.0), (y, 1.0), (x**2, 1.0), (x**2 * y, 3.0), (x * y, 0.0)):
        error = float(actual.std()) / len(actual) ** 0.5
        assert float(actual.mean()) == pytest.approx(expected, abs=4.5 * error)
    assert float(x.square().mean()) > 0.9


def test_a_step_is_in_detailed_balance() -> None:
    def potential(place: Tensor) -> tuple[Tensor, Tensor]:
        return torch.log(1 + place.square()).sum(dim=-1), 2 * place / (1 + place.square())

    generator = torch.Generator().manual_seed(0)
    here, there = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    size = torch.full((50,), 0.8, dtype=torch.float64)
    never = torch.ones(50, dtype=torch.float64)

    def flow(start: Tensor, end: Tensor) -> Tensor:
        """Log of π(start) · density of proposing end · probability of accepting it."""
        state = langevin.init(potential, start)
        white = (end - start + 0.32 * state.gradient) / 0.8
        after, info = langevin.step(potential, state, size, white, never)
        assert torch.equal(after.position, start)  # refused
        return -state.potential - white.square().sum(dim=-1) / 2 + info.probability.log()

    torch.testing.assert_close(flow(here, there), flow(there, here))


def test_a_step_into_the_void_is_refused() -> None:
    def wall(place: Tensor) -> tuple[Tensor, Tensor]:
        inside = place.abs() < 1
        return torch.where(inside, 0.0, torch.inf).sum(dim=-1), torch.zeros_like(place)

    start = langevin.init(wall, torch.zeros(1, 1, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    after, info = langevin.step(wall, start, one, 5 * one[None], 0 * one)
    assert float(info.probability) == 0
    assert not bool(info.accepted)
    assert float(after.position) == 0


def test_adaptation_ends_at_the_rate_that_it_is_for() -> None:
    def normal(place: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * place.square().sum(dim=-1), place

    generator = torch.Generator().manual_seed(0)
    chains, count = 40, 64
    white = partial(torch.randn, chains, count, generator=generator, dtype=torch.float64)
    state = langevin.init(normal, white())
    size = torch.full((chains,), 5.0, dtype=torch.float64)  # far too large
    rates = []
    for turn in range(600):
        uniform = torch.rand(chains, generator=generator, dtype=torch.float64)
        state, info = langevin.step(normal, state, size, white(), uniform)
        size = langevin.adapt(size, info, turn)
        rates.append(info.accepted.double().mean())
    assert float(torch.stack(rates[300:]).mean()) == pytest.approx(langevin.TARGET, abs=0.04)
    assert float(size.mean()) == pytest.approx(langevin.first_size(count), rel=0.25)


def test_noise_belongs_to_a_seed_and_not_to_its_batch() -> None:
    like = torch.empty(4, 2, 3, dtype=torch.float64)
    both = Noise([1, 2], like)  # two pieces for each of two tensors
    alone = Noise([2], like[2:])
    torch.testing.assert_close(both.normal()[2:], alone.normal())
    torch.testing.assert_close(both.uniform()[2:], alone.uniform())
    assert len(set(both.normal().flatten().tolist())) == 24
