"""What a product of experts certifies: energies that never rise, and a mode that is stationary."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poemerge.errors import NumericalError
from poemerge.task_vector import DenseStack
from tests import reference
from tests.core.stacks import Pair, assert_close, dense, factors, merge, pair, update
from tests.core.stacks import product as products

ROUNDING = 1e-14  # fp64, with some room for sums of many terms
STATIONARY = 1e-5  # ||H M - b|| / ||b|| of weights that are off by at most `rtol`
SHAPES = ((14, 5), (5, 14), (8, 8), (1, 9), (9, 1), (1, 1))
TWINS = {"dense": dense, "factors": factors}


def distinct(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    return [pair(rows, rank, columns, seed) for seed in range(count)]


def identical(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    return distinct(rows, columns, rank, 1) * count


def collinear(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    up, down = pair(rows, rank, columns, seed=0)
    return [((-1.5) ** i * up, down) for i in range(count)]


def orthogonal(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    """Each expert alone in its rows, as far as there are rows."""
    experts = distinct(rows, columns, rank, count)
    own = [torch.arange(rows) % count == i for i in range(count)]
    return [(up * mask[:, None], down) for (up, down), mask in zip(experts, own, strict=True)]


def zero_rows(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    (up, down), *rest = distinct(rows, columns, rank, count)
    up[: rows // 2] = 0
    return [(up, down), *rest]


def one_huge(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    (up, down), *rest = distinct(rows, columns, rank, count)
    return [(100 * up, down), *rest]


def one_idle(rows: int, columns: int, rank: int, count: int) -> list[Pair]:
    (up, down), *rest = distinct(rows, columns, rank, count)
    return [(torch.zeros_like(up), down), *rest]


KINDS = (distinct, identical, collinear, orthogonal, zero_rows, one_huge, one_idle)


def rounding(
    updates: list[torch.Tensor], merged: torch.Tensor, scale: str, epsilon: float
) -> float:
    """What an energy may be off by: terms of the size of ||G_i|| ||M||² cancel in q_i."""
    size = float(merged.square().sum())
    scales = reference.cauchy_scales(updates, scale, epsilon)
    total = 10.0
    for delta, gamma in zip(updates, scales, strict=True):
        gram = float(reference.gram(delta).norm())
        total += gram * max(gram, size) / (gamma or 1.0)
    return ROUNDING * total


@pytest.mark.parametrize("scale", ["paper", "equivariant"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("twin", TWINS)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    rank=st.sampled_from((1, 3)),
    count=st.sampled_from((1, 2, 9)),
    epsilon=st.sampled_from((1e-3, 0.1, 10.0)),
    ridge=st.sampled_from((1e-6, 1e-3, 1.0)),
)
def test_energies_never_rise(twin, side, scale, kind, shape, rank, count, epsilon, ridge) -> None:  # noqa: ANN001, PLR0917
    experts = kind(*shape, rank, count)
    settings = {"scale": scale, "side": side, "epsilon": epsilon, "ridge": ridge}
    merged = merge(TWINS[twin](experts), "cauchy_poe", **settings)
    certificate = merged.certificates[0]
    energies = certificate["energies"]
    assert len(energies) == certificate["steps"] + 1
    noise = rounding(products(experts), update(merged), scale, epsilon)
    assert all(after - before <= noise for before, after in pairwise(energies))
    settled = STATIONARY + certificate["noise"]
    assert certificate["residual"] <= settled or not certificate["converged"]
    assert sum(certificate["weights"]) == pytest.approx(1.0) or kind is one_idle
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", [distinct, zero_rows, one_huge])
def test_energy_is_the_one_of_the_reference(kind, side, twin) -> None:  # noqa: ANN001
    experts = kind(9, 6, 2, 3)
    merged = merge(TWINS[twin](experts), "cauchy_poe", side=side, ridge=0.01, epsilon=0.2)
    updates, mode = products(experts), update(merged)
    if side == "input":
        updates, mode = [a.T for a in updates], mode.T
    ones = [1.0] * len(updates)
    scales = reference.cauchy_scales(updates, "equivariant", 0.2)
    origin = reference.cauchy_weights(torch.zeros_like(mode), updates, ones, scales)
    ridge = reference.relative_ridge(updates, origin, 0.01)
    energy = reference.cauchy_energy(mode, updates, ones, scales, ridge)
    certificate = merged.certificates[0]
    assert certificate["energies"][-1] == pytest.approx(energy, rel=1e-9)
    # The mode is stationary: its own weights give it back.
    alphas = reference.cauchy_weights(mode, updates, ones, scales)
    assert_close(reference.mode(updates, alphas, ridge), mode, 1e-5)
    share = [alpha / sum(alphas) for alpha in alphas]
    assert certificate["weights"] == pytest.approx(share, rel=1e-3)


def test_the_loop_starts_at_the_gaussian_mode_with_equal_weights() -> None:
    experts = distinct(9, 6, 2, 3)
    updates, say, zero = products(experts), [1.0, 0.5, 2.0], torch.zeros(9, 6).double()
    scales = reference.cauchy_scales(updates, "equivariant", 0.1)
    origin = reference.cauchy_weights(zero, updates, say, scales)
    ridge = reference.relative_ridge(updates, origin, 0.01)
    start = reference.mode(updates, [sum(origin) / 3] * 3, ridge)
    energy = reference.cauchy_energy(start, updates, say, scales, ridge)
    merged = merge(dense(experts), "cauchy_poe", say, side="output", ridge=0.01)
    assert merged.certificates[0]["energies"][0] == pytest.approx(energy, rel=1e-9)


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4])
def test_the_last_step_is_the_first_whose_weights_ask_for_themselves(rtol: float) -> None:
    stack = dense(distinct(8, 8, 8, 3))
    certificate = merge(stack, "cauchy_poe", rtol=rtol, side="output").certificates[0]
    steps = certificate["steps"]
    assert steps > 2
    assert certificate["converged"]
    assert certificate["residual"] <= rtol
    cut = {"max_steps": steps - 1, "rtol": rtol, "side": "output"}
    assert not merge(stack, "cauchy_poe", **cut).certificates[0]["converged"]


def test_the_mode_has_the_least_energy_nearby() -> None:
    experts = distinct(9, 6, 2, 3)
    mode = update(merge(dense(experts), "gaussian_poe", side="output", ridge=0.01))
    updates, ones = products(experts), [1.0] * 3
    ridge = reference.relative_ridge(updates, ones, 0.01)
    least = reference.gaussian_energy(mode, updates, ones, ridge)
    for seed in range(5):
        step = 1e-3 * products([pair(9, 6, 6, seed)])[0]
        assert reference.gaussian_energy(mode + step, updates, ones, ridge) > least


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", [(20, 16), (5, 14)])
def test_condition_and_growth_are_those_of_the_whole_system(
    shape: tuple[int, int], side: str
) -> None:
    experts = distinct(*shape, 2, 3)
    updates = [a if side == "output" else a.T for a in products(experts)]
    ridge = reference.relative_ridge(updates, [1.0] * 3, 1e-3)
    eigenvalues = torch.linalg.eigvalsh(reference.system(updates, [1.0] * 3, ridge)[0])
    for twin in (dense, factors):
        merged = merge(twin(experts), "gaussian_poe", side=side, ridge=1e-3)
        certificate = merged.certificates[0]
        expected = float(eigenvalues[-1] / eigenvalues[0])
        assert certificate["condition"] == pytest.approx(expected, rel=0.2)
        growth = update(merged).norm() / max(a.norm() for a in updates)
        assert certificate["growth"] == pytest.approx(float(growth), rel=1e-9)
        assert certificate["converged"]
        assert certificate["steps"] == 0


def test_unsettled_is_said() -> None:
    (certificate,) = merge(
        dense(distinct(8, 8, 8, 3)), "cauchy_poe", max_steps=1, rtol=0.0
    ).certificates
    assert not certificate["converged"]
    assert certificate["steps"] == 1


def test_experts_that_change_nothing_merge_to_nothing() -> None:
    idle = [(torch.zeros(6, 2).double(), torch.ones(2, 4).double())] * 2
    for twin in (dense, factors):
        for method in ("gaussian_poe", "cauchy_poe"):
            merged = merge(twin(idle), method)
            assert not update(merged).any()
            json.dumps(merged.certificates, allow_nan=False)


def test_no_ridge_where_the_system_has_no_inverse() -> None:
    with pytest.raises(NumericalError, match="raise the setting `ridge`"):
        merge(dense(orthogonal(8, 4, 1, 2)), "gaussian_poe", ridge=0.0)


def test_no_ridge_in_factors_needs_none() -> None:
    experts = distinct(12, 10, 2, 3)
    merged = merge(factors(experts), "gaussian_poe", ridge=0.0)
    limit = merge(factors(experts), "gaussian_poe", ridge=1e-9)
    assert_close(update(merged), update(limit), 1e-5)
    json.dumps(merged.certificates, allow_nan=False)


@pytest.mark.parametrize("preset", ["", "paper"])
@pytest.mark.parametrize("twin", TWINS)
def test_updates_in_fp32_are_solved_in_fp64(twin: str, preset: str) -> None:
    single = [(up.float(), down.float()) for up, down in distinct(12, 6, 2, 3)]
    stack = TWINS[twin](single)
    exact = DenseStack(stack.dense().double()) if twin == "dense" else factors(doubled(single))
    expected = update(merge(exact, "cauchy_poe", preset=preset))
    actual = update(merge(stack, "cauchy_poe", preset=preset))
    assert actual.dtype == torch.float64
    assert_close(actual, expected)


def doubled(experts: list[Pair]) -> list[Pair]:
    return [(up.double(), down.double()) for up, down in experts]
