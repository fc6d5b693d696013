"""The posterior around a mode: dense references in fp64, laws, and draws that are what they say."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor

from poemerge.method import Call, Cut, Merged, Sampling
from poemerge.methods import find
from poemerge.methods.cauchy_poe import Cauchy
from poemerge.methods.gaussian_poe import Gaussian
from poemerge.methods.student_t_poe import StudentT
from poemerge.poe.entrywise import Entrywise
from poemerge.poe.experts import Tail
from poemerge.poe.inference import Stop, solve
from poemerge.poe.onesided import OneSided
from poemerge.poe.solver import Density
from poemerge.posterior import langevin
from poemerge.posterior.draws import Noise, posterior_of, whitened
from poemerge.posterior.laplace import FLATTEST, Laplace, laplace
from poemerge.task_vector import DenseStack, Stack
from tests.core.stacks import assert_close, dense, factors, pair

ROWS, COLUMNS, EXPERTS = 4, 3, 3
RIDGE = 0.3
CHAINS = 250
STOP = Stop(5000, 1e-13)


def scale_of(deltas: Tensor) -> Tensor:
    return 0.2 * (deltas @ deltas.mT).square().sum(dim=(-2, -1))


def tail(name: str, deltas: Tensor) -> Tail:
    trust = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)[:, : deltas.shape[1]]
    if name == "gaussian":
        return Gaussian(trust)
    if name == "cauchy":
        return Cauchy(trust, scale_of(deltas))
    return StudentT(trust, scale_of(deltas), torch.full((1, 1), 4.0, dtype=torch.float64))


def updates(scale: float = 1.0, seed: int = 0) -> Tensor:
    """(1, E, O, I)."""
    return dense([pair(ROWS, 3, COLUMNS, seed + s) for s in range(EXPERTS)]).dense() * scale


def precisions(kind: str, deltas: Tensor) -> Tensor:
    """P_i as matrices over the entries of M, row by row (E, O·I, O·I)."""
    unit = torch.eye(COLUMNS, dtype=torch.float64)
    if kind == "gram":
        return torch.stack([torch.kron(a @ a.T, unit) for a in deltas[0]])
    return torch.stack([torch.diag(f.flatten()) for f in fisher(deltas)[0]])


def fisher(deltas: Tensor) -> Tensor:
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


def energy(kind: str, cost: Tail, deltas: Tensor) -> Callable[[Tensor], Tensor]:
    """F of the entries of M, with nothing expanded."""
    matrices = precisions(kind, deltas)

    def value(entries: Tensor) -> Tensor:
        misses = [entries - a.flatten() for a in deltas[0]]
        residuals = torch.stack([m @ p @ m for m, p in zip(misses, matrices, strict=True)])
        return cost.energy(residuals[None]).sum() + 0.5 * RIDGE * entries @ entries

    return value


def matrix_of(found: Laplace) -> Tensor:
    """C with noise(Z) = C vec(Z)."""
    size = found.mode[0].numel()
    columns = torch.eye(size, dtype=torch.float64).reshape(size, 1, *found.mode.shape[1:])
    return torch.stack([found.noise(column).flatten() for column in columns], dim=1)


KINDS = pytest.mark.parametrize("kind", ["gram", "diagonal"])
TAILS = pytest.mark.parametrize("name", ["gaussian", "cauchy", "student"])


@KINDS
@TAILS
class TestLaplace:
    def test_covariance_is_the_inverse_hessian(self, kind: str, name: str) -> None:
        deltas = updates()
        density, mode = posed(kind, name, deltas)
        value = energy(kind, density.tail, deltas)
        slope = torch.autograd.functional.jacobian(value, mode.flatten())
        assert float(slope.norm()) < 1e-6 * float(value(mode.flatten()).abs())
        hessian = torch.autograd.functional.hessian(value, mode.flatten())
        found = laplace(density, mode, temperature=0.7)
        expected = float(found.variance) * torch.linalg.inv(hessian)
        matrix = matrix_of(found)
        assert_close(matrix @ matrix.T, expected, 1e-6)
        assert_close(found.variances().flatten(), expected.diagonal(), 1e-6)

    def test_gradients_are_pulled_back_by_the_transpose(self, kind: str, name: str) -> None:
        density, mode = posed(kind, name, updates())
        found = laplace(density, mode)
        gradient = torch.randn_like(mode)
        expected = matrix_of(found).T @ gradient.flatten()
        assert_close(found.pull_back(gradient).flatten(), expected)

    def test_the_unit_is_the_residual_energy(self, kind: str, name: str) -> None:
        deltas = updates()
        density, mode = posed(kind, name, deltas)
        entries = mode.flatten()
        misses = [entries - a.flatten() for a in deltas[0]]
        q = torch.stack([m @ p @ m for m, p in zip(misses, precisions(kind, deltas), strict=True)])
        left = density.tail.weights(q[None])[0] @ q + RIDGE * entries @ entries
        assert float(laplace(density, mode, 2.0).variance) == pytest.approx(
            2 * float(left) / entries.numel(), rel=1e-9
        )

    def test_whitened_potential_and_its_gradient(self, kind: str, name: str) -> None:
        deltas = updates()
        density, mode = posed(kind, name, deltas)
        found = laplace(density, mode)
        white = torch.randn(1, ROWS, COLUMNS, dtype=torch.float64)
        matrix, value = matrix_of(found), energy(kind, density.tail, deltas)

        def potential(z: Tensor) -> Tensor:
            start = mode.flatten()
            return (value(start + matrix @ z) - value(start)) / found.variance[0]

        slope = torch.autograd.functional.jacobian(potential, white.flatten())
        actual, gradient = whitened(density, found)(white)
        assert float(actual) == pytest.approx(float(potential(white.flatten())), rel=1e-7)
        assert_close(gradient.flatten(), slope, 1e-7)
        if name == "gaussian":
            assert float(actual) == pytest.approx(0.5 * float(white.square().sum()), rel=1e-7)


@KINDS
def test_slack_is_the_rate_of_plain_reweighting(kind: str) -> None:
    density, mode = posed(kind, "cauchy", updates())

    def reweight(entries: Tensor) -> Tensor:
        residuals, _ = density.form.residuals(entries.reshape(mode.shape))
        merged, _ = density.form.mode(density.tail.weights(residuals), density.ridge)
        return merged.flatten()

    jacobian = torch.autograd.functional.jacobian(reweight, mode.flatten())
    rates = torch.linalg.eigvals(jacobian).real.sort().values[-EXPERTS:]
    slack = laplace(density, mode).slack[0]
    assert 0.01 < float(slack.max()) < 1
    assert_close(slack.sort().values, rates, 1e-5)


def test_a_ridge_of_modes_is_not_taken_for_certain_nor_for_endless() -> None:
    # Two scalars that disagree: where the mode in the middle is about to split, F is flat.
    deltas = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    form = OneSided.of_grams(deltas, None, 1)
    cost = Cauchy(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    density = Density(form, cost, cost.weights(form.origins), torch.zeros(1, dtype=torch.float64))
    found = laplace(density, torch.zeros(1, 1, 1, dtype=torch.float64))
    assert float(found.slack.max()) == FLATTEST
    assert bool(found.variances().isfinite().all())


def sampled(stack: Stack, method: str, seed: int = 0, **options: object) -> Merged:
    """A merge with its posterior."""
    sampler = str(options.pop("sampler", "laplace"))
    temperature = float(str(options.pop("temperature", 1.0)))
    cut = options.pop("cut", None)
    batch, count = stack.dense().shape[:2]
    sampling = Sampling(tuple(seed + b for b in range(batch)), sampler, temperature)
    say = torch.ones(batch, count, dtype=torch.float64)
    found = find(method)
    call = Call(say, cut=cut, sampling=sampling)  # type: ignore[arg-type]
    return found.merge(stack, found.settings.parse(options), call)


def spread(merged: Merged) -> list[float]:
    assert merged.posterior is not None
    return [fact["relative_std"] for fact in merged.posterior.facts]


def draws(merged: Merged, count: int) -> Tensor:
    """(count, B, O, I)."""
    assert merged.posterior is not None
    return torch.stack([update.dense() for update in islice(merged.posterior.draws, count)])


METHODS = pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe", "student_t_poe"])


@METHODS
class TestLaws:
    def test_spread_has_no_unit(self, method: str) -> None:
        one, other = (spread(sampled(DenseStack(updates(s)), method)) for s in (1.0, 1e-3))
        assert one == pytest.approx(other, rel=1e-6)

    def test_spread_is_the_same_from_any_side(self, method: str) -> None:
        left, right = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (ROWS, COLUMNS))
        deltas = updates()
        turned = DenseStack(left @ deltas @ right)
        assert spread(sampled(DenseStack(deltas), method)) == pytest.approx(
            spread(sampled(turned, method)), rel=1e-6
        )
        output = spread(sampled(DenseStack(deltas), method, side="output"))
        mirrored = spread(sampled(DenseStack(deltas.mT), method, side="input"))
        assert output == pytest.approx(mirrored, rel=1e-9)

    def test_experts_that_contradict_leave_more(self, method: str) -> None:
        one = torch.linalg.qr(torch.randn(ROWS, COLUMNS).double())[0] + updates()[0, 0] / 10
        same = torch.stack([one, one * 1.01, one * 0.99])[None]
        agreed = spread(sampled(DenseStack(same), method, ridge=1e-6))[0]
        assert agreed < 0.1 * spread(sampled(DenseStack(updates()), method, ridge=1e-6))[0]

    def test_temperature_is_a_factor_on_the_variance(self, method: str) -> None:
        once = sampled(DenseStack(updates()), method)
        four = sampled(DenseStack(updates()), method, temperature=4.0)
        mode = once.update.dense()
        assert_close(draws(four, 3) - mode, 2 * (draws(once, 3) - mode))
        assert spread(once) == pytest.approx(spread(four))

    def test_draws_of_adapters_are_adapters(self, method: str) -> None:
        experts = [pair(12, 2, 10, seed) for seed in range(3)]
        merged = sampled(factors(experts), method)
        assert merged.posterior is not None
        for update in islice(merged.posterior.draws, 3):
            assert update.rank == 6  # type: ignore[union-attr]
            joint = torch.linalg.svd(torch.cat([up for up, _ in experts], dim=1))[0][:, 6:]
            assert float((joint.T @ update.dense()[0]).norm()) < 1e-9

    def test_a_batch_is_its_matrices(self, method: str) -> None:
        both = torch.cat([updates(), updates(seed=7)])
        together = draws(sampled(DenseStack(both), method, seed=5), 2)
        first = draws(sampled(DenseStack(both[:1]), method, seed=5), 2)
        second = draws(sampled(DenseStack(both[1:]), method, seed=6), 2)
        assert_close(together, torch.cat([first, second], dim=1), 1e-6)
        assert not torch.allclose(first[0], first[1])

    @pytest.mark.parametrize("side", ["input", "output"])
    @pytest.mark.parametrize(
        "cut",
        [
            None,
            Cut("rows", (3, 3, 2)),
            Cut("columns", (2, 2, 2)),
            Cut("rows", (4, 2, 2), apart=True),
        ],
    )
    def test_a_cold_draw_is_the_mode(self, method: str, side: str, cut: Cut | None) -> None:
        for stack in (factors([pair(8, 2, 6, s) for s in range(3)]),
                      dense([pair(8, 6, 6, s) for s in range(3)])):  # fmt: skip
            merged = sampled(stack, method, cut=cut, side=side, temperature=1e-24)
            assert_close(draws(merged, 2)[1], merged.update.dense(), 1e-9)
            assert 0 < spread(merged)[0] < 5


def test_adapters_know_what_their_dense_twins_know_inside_the_joint_space() -> None:
    experts = [pair(9, 2, 8, seed) for seed in range(2)]
    deltas, lift = factors(experts).reduced(rows=True, columns=True)
    density, mode = posed("gram", "cauchy", deltas)
    small = laplace(density, mode)
    whole = dense(experts).dense()
    twin = Density(OneSided.of_grams(whole, None, 9), density.tail, density.start, density.ridge)
    big = laplace(twin, lift(mode).dense())
    ways = [lift(unit.reshape(1, 4, 4)).dense().flatten() for unit in torch.eye(16).double()]
    inside = torch.stack(ways, dim=1)  # (O·I, K·K'), orthonormal
    precision = torch.linalg.inv(matrix_of(big) @ matrix_of(big).T / big.variance)
    conditional = torch.linalg.inv(inside.T @ precision @ inside)
    assert_close(matrix_of(small) @ matrix_of(small).T / small.variance, conditional, 1e-6)


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
