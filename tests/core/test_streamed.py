"""Experts that come one by one give the answer of experts that are held all at once."""

from dataclasses import replace

import pytest
import torch

from poemerge.method import Call
from poemerge.methods import find
from poemerge.poe import pieces
from poemerge.poe.certificate import TRUSTED_ERROR
from poemerge.task_vector import DenseStack, LowRankStack, StreamedStack

EXPERTS = 5


def _updates(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    sizes = torch.linspace(0.3, 3.0, EXPERTS).view(-1, 1, 1)
    return (sizes * torch.randn(EXPERTS, rows, columns)).to(dtype)


def _stream(updates: torch.Tensor) -> tuple[StreamedStack, list[int]]:
    asked: list[int] = []

    def read(index: int) -> torch.Tensor:
        asked.append(index)
        return updates[index]

    return StreamedStack(read, len(updates), tuple(updates.shape[1:]), updates.dtype), asked


CALL = Call(torch.tensor([[1.0, 0.5, 2.0, 1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe", "student_t_poe"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (12, 12)])
def test_the_answer_is_that_of_all_at_once(method: str, side: str, shape: tuple[int, int]) -> None:
    found = find(method)
    options = {"side": side} if method == "gaussian_poe" else {"side": side, "rtol": 1e-9}
    settings = found.settings.parse(options)
    updates = _updates(*shape)
    held = found.merge(DenseStack(updates[None]), settings, CALL)
    stream, asked = _stream(updates)
    streamed = found.merge(stream, settings, CALL)
    scale = held.update.norm()
    gap = torch.linalg.norm(streamed.update.dense() - held.update.dense()) / scale
    assert gap < 1e-8
    one, other = held.certificates[0], streamed.certificates[0]
    assert other["converged"]
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-6)
    assert one["condition"] == pytest.approx(other["condition"], rel=0.2)
    assert other["residual"] < 1e-8
    passes = len(asked) / EXPERTS
    assert passes == int(passes)  # whole passes over the experts, and no more than ...
    assert passes <= 6 + 2 * (other["steps"] + 1)  # ... two for each step, and a few around them


@pytest.mark.parametrize("scale", ["paper", "equivariant", "estimated"])
def test_in_fp32_the_error_is_within_what_the_condition_says(scale: str) -> None:
    found = find("cauchy_poe")
    settings = found.settings.parse({"scale": scale})
    updates = _updates(400, 500, torch.float32)
    exact = found.merge(DenseStack(updates[None].double()), settings, CALL).update.dense()
    stream, _ = _stream(updates)
    merged = found.merge(stream, settings, CALL)
    assert merged.certificates[0]["dtype"] == "float32"
    bound = merged.certificates[0]["condition"] * torch.finfo(torch.float32).eps
    gap = torch.linalg.norm(merged.update.dense() - exact) / torch.linalg.norm(exact)
    assert gap < bound < TRUSTED_ERROR


def test_what_fp32_cannot_solve_is_solved_in_fp64() -> None:
    found = find("gaussian_poe")
    settings = found.settings.parse({"ridge": 1e-9})
    thin = _updates(300, 4, torch.float32) @ torch.randn(EXPERTS, 4, 300)
    stream, _ = _stream(thin)
    merged = found.merge(stream, settings, CALL)
    assert merged.certificates[0]["dtype"] == "float64"
    held = found.merge(DenseStack(thin[None]), settings, CALL)
    torch.testing.assert_close(merged.update.dense(), held.update.dense(), rtol=1e-4, atol=1e-6)


def test_many_factors_are_not_held_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    ups = tuple(torch.randn(1, 20, 2) for _ in range(EXPERTS))
    downs = tuple(torch.randn(1, 2, 30) for _ in range(EXPERTS))
    stack, found = LowRankStack(ups, downs), find("cauchy_poe")
    settings = found.settings.parse({"rtol": 1e-9})
    held = found.merge(stack, settings, CALL)
    assert stack.reduced_bytes(True, True) == 8 * EXPERTS * 10 * 10
    monkeypatch.setattr(pieces, "HELD", 8 * EXPERTS * 10 * 10 - 1)
    streamed = found.merge(stack, settings, CALL)
    torch.testing.assert_close(streamed.update.dense(), held.update.dense(), rtol=1e-7, atol=1e-8)
    assert type(streamed.update) is type(held.update)
    monkeypatch.setattr(LowRankStack, "streamed", None)  # a batch of two is held all the same
    both = LowRankStack(
        tuple(u.repeat(2, 1, 1) for u in ups), tuple(d.repeat(2, 1, 1) for d in downs)
    )
    twice = replace(CALL, weights=CALL.weights.repeat(2, 1))
    found.merge(both, settings, twice)
