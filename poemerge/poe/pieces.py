"""Matrices whole or in pieces: fused projections, attention heads, blocks of rows.

The precisions act on the axis O of what comes in here (product.py turns the input side). A cut is

    along O          the pieces are matrices of their own
    along I          the pieces share the precisions of the whole and have weights of their own
    along I, apart   the pieces are matrices of their own (fused projections), as are all of a
                     precision that is entrywise: it has nothing to share

An axis that is not cut may be exchanged for a joint basis first, as for whole matrices.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from poemerge.method import Call
from poemerge.poe.certificate import Certificate, combine
from poemerge.poe.experts import Precision
from poemerge.poe.solver import Problem
from poemerge.task_vector import DenseStack, Stack, Update

Solve = Callable[[Problem], tuple[Tensor, list[Certificate]]]
ROWS, COLUMNS = -2, -1


def solve_in_pieces(
    stack: Stack, call: Call, precision: Precision, solve: Solve, *, turned: bool
) -> tuple[Update, list[Certificate]]:
    """The modes of a stack of matrices (O, I), and one certificate for each matrix.

    Args:
        stack: updates; the precisions act on their rows.
        call: weights, curvature, and how to cut.
        precision: row of the table of precisions.
        solve: gives modes and certificates of a problem.
        turned: True if the stack is transposed, so that the cut names the other axis.
    """
    if call.cut is None:
        deltas, lift = stack.reduced(*precision.reduces)
        merged, certificates = solve(Problem(deltas, call.curvature, call.weights, stack.shape[0]))
        return lift(merged), certificates
    axis = COLUMNS if (call.cut.axis == "rows") == turned else ROWS
    if axis == COLUMNS and precision.matrices and not call.cut.apart:
        return _share(stack, call, precision, solve)
    return _part(stack, call, precision, solve, axis)


def _share(
    stack: Stack, call: Call, precision: Precision, solve: Solve
) -> tuple[Update, list[Certificate]]:
    """Pieces of equal width along I that share their precisions; a shorter last one is padded."""
    deltas, lift = stack.reduced(precision.reduces[0], columns=False)
    count, size, wide = len(call.sizes), max(call.sizes), deltas.shape[-1]
    padded = pad(deltas, (0, count * size - wide))
    problem = Problem(padded, call.curvature, call.weights, stack.shape[0], count)
    merged, pieces = solve(problem)
    whole = merged.unflatten(0, (-1, count)).movedim(1, -2).flatten(-2)[..., :wide]
    groups = [pieces[start : start + count] for start in range(0, len(pieces), count)]
    return lift(whole), [combine(group) for group in groups]


def _part(
    stack: Stack, call: Call, precision: Precision, solve: Solve, axis: int
) -> tuple[Update, list[Certificate]]:
    """Pieces that are matrices of their own; those of one size go together."""
    reduces = precision.reduces
    free = (False, reduces[1]) if axis == ROWS else (reduces[0], False)
    deltas, lift = stack.reduced(*free)
    starts = list(accumulate(call.sizes, initial=0))[:-1]
    found: dict[int, Tensor] = {}
    certificates: list[list[Certificate]] = [[] for _ in deltas]
    for size in sorted(set(call.sizes)):
        chosen = [s for s, width in zip(starts, call.sizes, strict=True) if width == size]
        own = torch.cat([deltas.narrow(axis, start, size) for start in chosen])
        given = _curvature(call.curvature, precision, axis, chosen, size)
        small, back = DenseStack(own).reduced(axis == ROWS and reduces[0], columns=False)
        whole = size if axis == ROWS else stack.shape[0]
        weights = call.weights.repeat(len(chosen), 1)
        merged, solved = solve(Problem(small, given, weights, whole))
        found |= dict(zip(chosen, back(merged).dense().chunk(len(chosen)), strict=True))
        for i, certificate in enumerate(solved):
            certificates[i % len(certificates)].append(certificate)
    joined = torch.cat([found[start] for start in starts], dim=axis)
    return lift(joined), [combine(pieces) for pieces in certificates]


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
