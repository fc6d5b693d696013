"""Matrices whole or in pieces: fused projections, attention heads, blocks of rows.

The precisions act on the axis O of what comes in here (product.py turns the input side). A cut is

    along O          the pieces are matrices of their own
    along I          the pieces share the precisions of the whole and have weights of their own
    along I, apart   the pieces are matrices of their own (fused projections), as are all of a
                     precision that is entrywise: it has nothing to share

An axis that is not cut may be exchanged for a joint basis first, as for whole matrices.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from poemerge.method import Call
from poemerge.poe.experts import Precision
from poemerge.poe.solver import Problem, Updates
from poemerge.task_vector import DenseStack, LowRankStack, Stack, StreamedStack
from poemerge.update import Lift, Update

ROWS, COLUMNS = -2, -1
HELD = 1 << 30  # bytes of all experts' coordinates of a matrix; beyond, experts come one by one
Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Pieces:
    """A stack of B matrices as problems to solve, and the way back.

    Attributes:
        problems: pieces of one size together.
        join: answers to the problems, one tensor each, → the merged update (B, O, I).
        batch: B.
        adjacent: True if the pieces of a matrix follow one another in a problem; else the matrices
            take turns.
    """

    problems: tuple[Problem, ...]
    join: Callable[[Sequence[Tensor]], Update]
    batch: int
    adjacent: bool = False

    def sort(self, facts: Iterable[Sequence[Fact]]) -> list[list[Fact]]:
        """One fact on every piece of every problem → those on each matrix."""
        found: list[list[Fact]] = [[] for _ in range(self.batch)]
        for own in facts:
            count = len(own) // self.batch
            for index, fact in enumerate(own):
                found[index // count if self.adjacent else index % self.batch].append(fact)
        return found


def cut_up(
    stack: Stack | StreamedStack, call: Call, precision: Precision, *, turned: bool
) -> Pieces:
    """The problems that a stack of matrices (O, I) falls into.

    Args:
        stack: updates; the precisions act on their rows.
        call: weights, curvature, seeds, and how to cut.
        precision: row of the table of precisions.
        turned: True if the stack is transposed, so that the cut names the other axis.
    """
    if call.cut is None:
        deltas, lift = _coordinates(stack, precision)
        whole = Problem(deltas, call.curvature, call.weights, stack.shape[0], seeds=call.draw_seeds)
        return Pieces((whole,), lambda answers: lift(answers[0]), len(call.weights))
    assert not isinstance(stack, StreamedStack)  # which the plan makes of whole matrices alone
    axis = COLUMNS if (call.cut.axis == "rows") == turned else ROWS
    if axis == COLUMNS and precision.matrices and not call.cut.apart:
        return _share(stack, call, precision)
    return _part(stack, call, precision, axis)


def _coordinates(stack: Stack | StreamedStack, precision: Precision) -> tuple[Updates, Lift]:
    """Updates in a joint basis, one by one where they would take more than `HELD` bytes."""
    axes = precision.reduces
    if not (isinstance(stack, LowRankStack) and precision.streams and stack.is_single):
        return stack.reduced(*axes)
    return stack.streamed(*axes) if stack.reduced_bytes(*axes) > HELD else stack.reduced(*axes)


def _share(stack: Stack, call: Call, precision: Precision) -> Pieces:
    """Pieces of equal width along I that share their precisions; a shorter last one is padded."""
    deltas, lift = stack.reduced(precision.reduces[0], columns=False)
    count, size, wide = len(call.sizes), max(call.sizes), deltas.shape[-1]
    padded = pad(deltas, (0, count * size - wide))
    problem = Problem(padded, call.curvature, call.weights, stack.shape[0], count, call.draw_seeds)

    def join(answers: Sequence[Tensor]) -> Update:
        (merged,) = answers
        return lift(merged.unflatten(0, (-1, count)).movedim(1, -2).flatten(-2)[..., :wide])

    return Pieces((problem,), join, len(deltas), adjacent=True)


def _part(stack: Stack, call: Call, precision: Precision, axis: int) -> Pieces:
    """Pieces that are matrices of their own; those of one size go together."""
    reduces = precision.reduces
    free = (False, reduces[1]) if axis == ROWS else (reduces[0], False)
    deltas, lift = stack.reduced(*free)
    starts = list(accumulate(call.sizes, initial=0))[:-1]
    problems: list[Problem] = []
    ways: list[tuple[list[int], Lift]] = []
    for size in sorted(set(call.sizes)):
        chosen = [s for s, width in zip(starts, call.sizes, strict=True) if width == size]
        own = torch.cat([deltas.narrow(axis, start, size) for start in chosen])
        given = _curvature(call.curvature, precision, axis, chosen, size)
        small, back = DenseStack(own).reduced(axis == ROWS and reduces[0], columns=False)
        whole = size if axis == ROWS else stack.shape[0]
        seeds = tuple(seed + start for start in chosen for seed in call.draw_seeds)
        weights = call.weights.repeat(len(chosen), 1)
        problems.append(Problem(small, given, weights, whole, seeds=seeds))
        ways.append((chosen, back))

    def join(answers: Sequence[Tensor]) -> Update:
        found: dict[int, Tensor] = {}
        for (chosen, back), answer in zip(ways, answers, strict=True):
            found |= dict(zip(chosen, back(answer).dense().chunk(len(chosen)), strict=True))
        return lift(torch.cat([found[start] for start in starts], dim=axis))

    return Pieces(tuple(problems), join, len(deltas))


def _curvature(
    given: Tensor | None, precision: Precision, axis: int, starts: list[int], size: int
) -> Tensor | None:
    """What belongs to the pieces: entries of a diagonal, blocks of a matrix along the cut axis."""
    if given is None:
        return None
    if precision.matrices and axis == COLUMNS:
        return torch.cat([given] * len(starts))
    parts = [given.narrow(axis, start, size) for start in starts]
    if precision.matrices:
        parts = [p.narrow(COLUMNS, s, size) for p, s in zip(parts, starts, strict=True)]
    return torch.cat(parts)
