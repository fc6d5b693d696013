"""How a product is solved: in fp32 where that suffices, in fewer dimensions, in fewer steps."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from poemerge.methods.cauchy_poe import Cauchy
from poemerge.poe import inference, solver
from poemerge.poe.anderson import Anderson
from poemerge.poe.inference import Mode, Stop, solve
from poemerge.poe.onesided import OneSided
from poemerge.task_vector import DenseStack
from tests.core.stacks import Pair, assert_close, dense, distance, factors, merge, pair, update
from tests.core.stacks import product as products
from tests.core.test_properties import TAILS
from tests.reference_family import product

SINGLE = 1e-4  # fp32 against fp64, at the conditions that these cases have


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every matrix were too large for fp64 at once."""
    monkeypatch.setattr(solver, "SMALL", 0)


def halved(experts: list[Pair]) -> DenseStack:
    """Dense, in fp32, as files are loaded."""
    return DenseStack(dense(experts).deltas.float())


@pytest.mark.usefixtures("large")
class TestSinglePrecision:
    @pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16), (3, 9), (9, 3)])
    @pytest.mark.parametrize("side", ["output", "input"])
    @pytest.mark.parametrize("tail", TAILS)
    def test_agrees_with_double(self, shape: tuple[int, int], side: str, tail: str) -> None:
        experts = [pair(shape[0], 5, shape[1], seed) for seed in range(4)]
        robust = {} if tail == "gaussian" else {"epsilon": 1.0}
        merged = merge(halved(experts), f"{tail}_poe", side=side, ridge=0.1, **robust)
        assert update(merged).dtype == torch.float32
        assert merged.certificates[0]["dtype"] == "float32"
        exact = DenseStack(halved(experts).deltas.double())
        settled = {} if tail == "gaussian" else {"rtol": 1e-10, "max_steps": 400}
        expected = merge(exact, f"{tail}_poe", side=side, ridge=0.1, **robust, **settled)
        assert_close(update(merged).double(), update(expected), SINGLE)

    @pytest.mark.parametrize("side", ["output", "input"])
    @pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe"])
    def test_takes_double_where_the_condition_asks_for_it(self, method: str, side: str) -> None:
        experts = [pair(12, 2, 12, seed) for seed in range(3)]
        settings = {"side": side, "ridge": 1e-7}
        merged = merge(halved(experts), method, **settings)
        (certificate,) = merged.certificates
        assert certificate["dtype"] == "float64"
        assert certificate["condition"] > 1e6
        expected = merge(DenseStack(halved(experts).deltas.double()), method, **settings)
        assert_close(update(merged), update(expected).float(), 1e-6)

    def test_takes_double_where_the_weights_are_rounding(self) -> None:
        """A merge all but on one expert leaves its residual few digits, whatever the condition."""
        experts = [pair(12, 12, 12, seed) for seed in range(3)]
        settings = {"side": "output", "ridge": 1.0, "epsilon": 3e-4}
        (certificate,) = merge(halved(experts), "cauchy_poe", **settings).certificates
        assert certificate["dtype"] == "float64"
        assert certificate["condition"] < 1e4
        wider = settings | {"epsilon": 3e-3}
        (certificate,) = merge(halved(experts), "cauchy_poe", **wider).certificates
        assert certificate["dtype"] == "float32"

    @pytest.mark.parametrize("factor", [1e-3, 1e3])
    def test_the_size_of_the_updates_decides_nothing(self, factor: float) -> None:
        experts = [(factor * up, down) for up, down in (pair(16, 16, 16, s) for s in range(3))]
        for tail in TAILS:
            (certificate,) = merge(halved(experts), f"{tail}_poe", ridge=0.1).certificates
            assert certificate["dtype"] == "float32"

    def test_only_the_matrix_that_needs_it(self) -> None:
        """In a batch; and it is the same as alone."""
        plain = halved([pair(8, 8, 8, seed) for seed in range(3)]).deltas
        bad = halved([pair(8, 1, 8, seed) for seed in range(3)]).deltas
        settings = {"ridge": 1e-6, "side": "output"}
        for order in ((plain, bad), (bad, plain)):
            merged = merge(DenseStack(torch.cat(order)), "gaussian_poe", **settings)
            kinds = [c["dtype"] for c in merged.certificates]
            assert kinds == ["float32" if stack is plain else "float64" for stack in order]
            for index, stack in enumerate(order):
                alone = update(merge(DenseStack(stack), "gaussian_poe", **settings))
                assert_close(merged.update.dense()[index], alone)

    @pytest.mark.parametrize("side", ["output", "input"])
    def test_in_pieces(self, side: str) -> None:
        """Blocks of rows share a gram on the input side, and are matrices on the output side."""
        experts = [pair(12, 1, 5, seed) for seed in range(3)]
        settings = {"side": side, "granularity": "rows", "block_rows": 4, "ridge": 1e-7}
        merged = merge(halved(experts), "cauchy_poe", **settings, epsilon=1.0)
        exact = DenseStack(halved(experts).deltas.double())
        expected = merge(exact, "cauchy_poe", **settings, epsilon=1.0)
        assert merged.certificates[0]["dtype"] == "float64"
        assert_close(update(merged), update(expected).float(), 1e-6)

    def test_the_least_digits_of_all_pieces_are_certified(self) -> None:
        experts = [pair(8, 8, 9, seed) for seed in range(3)]
        for up, _ in experts:
            up[:4, 1:] = 0
        settings = {"side": "output", "granularity": "rows", "block_rows": 4, "ridge": 1e-6}
        (certificate,) = merge(halved(experts), "cauchy_poe", **settings, epsilon=1.0).certificates
        assert certificate["dtype"] == "float32"
        assert certificate["condition"] > 1e5


class TestFewerDimensions:
    """Tall and few: E · I < O is solved in the joint column space (Woodbury's identity)."""

    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("precision", ["gram", "identity"])
    @pytest.mark.parametrize("tail", TAILS)
    def test_is_the_plain_solve(self, tail: str, precision: str, turned: bool) -> None:
        experts = [pair(30, 3, 4, seed) for seed in range(3)]
        if turned:
            experts = [(down.T, up.T) for up, down in experts]
        side = "input" if turned else "output"
        own = {} if tail == "gaussian" else {"epsilon": 1.0}
        settled = {} if tail == "gaussian" else {"rtol": 1e-10, "max_steps": 400}
        updates = products(experts)
        form = product(updates, [1.0] * 3, precision, side, tail=tail, ridge=0.02, **own)
        merged = merge(
            dense(experts),
            f"{tail}_poe",
            precision=precision,
            side=side,
            ridge=0.02,
            **own | settled,
        )
        assert_close(update(merged), form.solve().view_as(updates[0]), 1e-7)

    def test_is_taken(self) -> None:
        """Or the law above would be about nothing."""
        stack = dense([pair(30, 3, 4, seed) for seed in range(3)])
        small, lift = stack.reduced(True, False)
        assert small.shape == (1, 3, 12, 4)
        assert_close(lift(small[:, 0]).dense()[0], stack.deltas[0, 0])
        wide, _ = dense([pair(12, 3, 4, seed) for seed in range(3)]).reduced(True, False)
        assert wide.shape == (1, 3, 12, 4)

    def test_the_condition_is_that_of_the_whole_system(self) -> None:
        experts = [pair(30, 3, 4, seed) for seed in range(3)]
        form = product(products(experts), [1.0] * 3, side="output", ridge=0.02)
        eigenvalues = torch.linalg.eigvalsh(form.system(form.origin, form.prior)[0])
        (certificate,) = merge(
            dense(experts), "gaussian_poe", side="output", ridge=0.02
        ).certificates
        expected = float(eigenvalues[-1] / eigenvalues[0])
        assert certificate["condition"] == pytest.approx(expected, rel=0.2)


class Plain(Anderson):
    """No mixing at all."""

    def next(self, _: Tensor, asked: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
        return asked, torch.ones_like(better)


class Wild(Anderson):
    """Mixing at its worst: leaps, until told that one failed."""

    turn = 0

    def next(self, _: Tensor, asked: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
        self.turn += 1
        leap = 30 * torch.cos(torch.arange(1.0, asked.numel() + 1) * self.turn).view_as(asked)
        proposal = torch.where(better.unsqueeze(-1), asked + leap, asked)
        return proposal, ~better


# A ridge and a scale that leave several experts in balance: reweighting crawls.
SLOW = [pair(8, 8, 8, seed) for seed in range(6)]
SCALE, RIDGE = 0.15, 0.02


class TestAnderson:
    def solve(self, start: list[float], steps: int = 3000) -> Mode:
        deltas = dense(SLOW).deltas
        form = OneSided.of_grams(deltas, None, 8)
        tail = Cauchy(torch.ones(1, 6).double(), SCALE * form.origins)
        ridge = RIDGE * form.mean_diagonal(tail.weights(form.origins))
        weights = torch.tensor([start], dtype=torch.float64) * tail.weights(form.origins)
        return solve(form, tail, weights, ridge, Stop(steps, 1e-9))

    def energies(self, mode: Mode) -> list[float]:
        return torch.cat(mode.energies).tolist()

    def test_takes_fewer_steps_to_the_same_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mixed = self.solve([1.0] * 6)
        monkeypatch.setattr(inference, "Anderson", Plain)
        plain = self.solve([1.0] * 6)
        assert bool(mixed.converged)
        assert bool(plain.converged)
        assert int(plain.steps) > 60
        assert int(mixed.steps) < int(plain.steps) / 2
        assert_close(mixed.merged, plain.merged, 1e-6)

    @pytest.mark.parametrize("first", range(6))
    @pytest.mark.parametrize("lead", [1e-12, 1e-4, 1e4, 1e12])
    def test_no_start_makes_an_energy_rise(self, first: int, lead: float) -> None:
        start = [1.0] * 6
        start[first] = lead
        mode = self.solve(start)
        assert bool(mode.converged)
        energies = self.energies(mode)
        assert all(b - a <= 1e-13 * abs(a) for a, b in pairwise(energies))
        assert energies[-1] < energies[0]

    def test_no_proposal_makes_an_energy_rise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leaps are thrown away, and the steps between them still arrive."""
        expected = self.solve([1.0] * 6)
        monkeypatch.setattr(inference, "Anderson", Wild)
        monkeypatch.setattr(inference, "LEAP", 1e9)
        mode = self.solve([1.0] * 6)
        energies = self.energies(mode)
        assert all(b - a <= 1e-13 * abs(a) for a, b in pairwise(energies))
        assert bool(mode.converged)
        assert energies[-1] == pytest.approx(float(expected.energies[-1]), rel=1e-9)

    def test_a_leap_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that the mode is the one that reweighting leads to, where there are several."""
        monkeypatch.setattr(inference, "Anderson", Plain)
        plain = self.energies(self.solve([1.0] * 6))
        monkeypatch.setattr(inference, "Anderson", Wild)
        assert self.energies(self.solve([1.0] * 6)) == plain


def test_seeds_that_used_to_leap_end_in_the_mode_of_plain_steps() -> None:
    """Random experts with a small scale have several modes; mixing must not choose among them."""
    others = 0
    for seed in range(40):
        experts = [pair(8, 5, 5, i + 100 * seed) for i in range(4)]
        merged = merge(factors(experts), "cauchy_poe", epsilon=0.02, max_steps=1000, rtol=1e-8)
        form = product(products(experts), [1.0] * 4, tail="cauchy", epsilon=0.02, ridge=0.03)
        others += distance(update(merged).flatten(), form.solve()) > 1e-4
    assert others == 0
