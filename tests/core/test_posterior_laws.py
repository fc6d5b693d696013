"""Laws of the posterior of a merge: its spread has no unit, and its draws are updates."""

from itertools import islice

import pytest
import torch
from torch import Tensor

from poemerge.method import Call, Cut, Merged, Sampling
from poemerge.methods import find
from poemerge.task_vector import DenseStack, Stack
from tests.core.posed import COLUMNS, ROWS, updates
from tests.core.stacks import assert_close, dense, factors, pair


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
