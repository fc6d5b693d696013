"""The Laplace posterior around a mode: dense references in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poemerge.methods.cauchy_poe import Cauchy
from poemerge.poe.experts import Tail
from poemerge.poe.onesided import OneSided
from poemerge.poe.solver import Density
from poemerge.posterior.draws import whitened
from poemerge.posterior.laplace import FLATTEST, laplace
from tests.core.posed import COLUMNS, EXPERTS, RIDGE, ROWS, fisher, matrix_of, posed, updates
from tests.core.stacks import assert_close, dense, factors, pair


def precisions(kind: str, deltas: Tensor) -> Tensor:
    """P_i as matrices over the entries of M, row by row (E, O·I, O·I)."""
    unit = torch.eye(COLUMNS, dtype=torch.float64)
    if kind == "gram":
        return torch.stack([torch.kron(a @ a.T, unit) for a in deltas[0]])
    return torch.stack([torch.diag(f.flatten()) for f in fisher(deltas)[0]])


def energy(kind: str, cost: Tail, deltas: Tensor) -> Callable[[Tensor], Tensor]:
    """F of the entries of M, with nothing expanded."""
    matrices = precisions(kind, deltas)

    def value(entries: Tensor) -> Tensor:
        misses = [entries - a.flatten() for a in deltas[0]]
        residuals = torch.stack([m @ p @ m for m, p in zip(misses, matrices, strict=True)])
        return cost.energy(residuals[None]).sum() + 0.5 * RIDGE * entries @ entries

    return value


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
