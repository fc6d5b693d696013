"""Stacks of task vectors for the tests of the methods: dense and low-rank twins, and tolerances."""

from collections.abc import Sequence

import torch
from torch import Tensor

from poemerge.method import Call, Cut, Merged
from poemerge.methods import find
from poemerge.task_vector import DenseStack, LowRankStack, Stack

# Frobenius norm of the difference, relative to that of what is expected.
EXACT = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LIMIT = 1e-5  # of a law that holds as the ridge or 1/ε goes to 0, at SMALL
SMALL = 1e-7

Pair = tuple[Tensor, Tensor]  # up (O, R), down (R, I)


def pair(rows: int, rank: int, columns: int, seed: int) -> Pair:
    """Seeded factors whose product has entries of about 1, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return up, torch.randn(rank, columns, generator=generator, dtype=torch.float64) / rank**0.5


def product(experts: Sequence[Pair]) -> list[Tensor]:
    """The updates multiplied out."""
    return [up @ down for up, down in experts]


def dense(experts: Sequence[Pair]) -> DenseStack:
    """The dense twin, one matrix."""
    return DenseStack(torch.stack(product(experts)).unsqueeze(0))


def factors(experts: Sequence[Pair]) -> LowRankStack:
    """The low-rank twin, one matrix."""
    ups, downs = zip(*experts, strict=True)
    return LowRankStack(tuple(u.unsqueeze(0) for u in ups), tuple(d.unsqueeze(0) for d in downs))


def merge(
    stack: Stack,
    method: str,
    weights: Sequence[float] | None = None,
    *,
    given: Sequence[Tensor] | None = None,
    cut: Cut | None = None,
    **settings: object,
) -> Merged:
    """Apply a method by its name; every expert has a say of 1 if nothing else is said.

    Args:
        stack: of task vectors.
        method: its name.
        weights: of the experts.
        given: what the experts' curvature files hold for the one matrix of the stack.
        cut: pieces that the plan would ask for.
        settings: of the method.
    """
    found = find(method)
    batch, count = stack.dense().shape[:2]
    say = torch.tensor([weights or [1.0] * count] * batch, dtype=torch.float64)
    curvature = None if given is None else torch.stack(list(given)).unsqueeze(0)
    call = Call(say, curvature=curvature, cut=cut)
    return found.merge(stack, found.settings.parse(settings), call)


def update(merged: Merged) -> Tensor:
    """The merged update of a stack of one matrix."""
    return merged.update.dense()[0]


def distance(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    scale = float(torch.linalg.norm(expected.double())) or 1.0
    return float(torch.linalg.norm(actual.double() - expected.double())) / scale


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Equal within `tolerance`, or what the dtype of `actual` allows."""
    assert actual.shape == expected.shape
    assert distance(actual, expected) <= (tolerance or EXACT[actual.dtype])
