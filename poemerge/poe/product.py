"""A product of experts over a stack of task vectors: from settings to mode and certificate."""

from dataclasses import replace
from functools import partial

from poemerge.method import Call, Cut, Merged
from poemerge.poe.experts import PRECISIONS
from poemerge.poe.pieces import solve_in_pieces
from poemerge.poe.settings import ProductSettings
from poemerge.poe.solver import Energy, solve_matrices
from poemerge.task_vector import Dense, DenseStack, Stack


def product_of_experts(stack: Stack, energy: Energy, call: Call) -> Merged:
    """Solve every tensor of the stack for the mode of its product of experts.

    Args:
        stack: task vectors of B matrices (O, I); of any shape where the precision is entrywise.
        energy: what the experts' disagreement costs.
        call: weights of the experts, their curvature, and the pieces to cut matrices into.

    Raises:
        NumericalError: a system has no unique solution, even in fp64.
    """
    if len(stack.shape) != 2:
        return _as_rows(stack, energy, call)
    if call.cut is None:
        call = replace(call, cut=_blocks(stack, energy.settings))
    turned = energy.settings.acts_on == "input"
    update, certificates = solve_in_pieces(
        stack.mT if turned else stack,
        call,
        PRECISIONS[energy.settings.precision],
        partial(solve_matrices, energy),
        turned=turned,
    )
    dicts = tuple(certificate.as_dict() for certificate in certificates)
    return Merged(update.mT if turned else update, dicts)


def _blocks(stack: Stack, settings: ProductSettings) -> Cut | None:
    """The pieces that the settings ask for, whatever the matrix is called."""
    rows, columns = stack.shape
    if settings.granularity == "rows":
        return Cut.into_blocks("rows", rows, settings.block_rows)
    if settings.granularity == "square" and isinstance(stack, DenseStack) and rows % columns == 0:
        return Cut.into_blocks("rows", rows, columns)
    return None


def _as_rows(stack: Stack, energy: Energy, call: Call) -> Merged:
    """Vectors, and tensors of more axes, as matrices of one row."""
    deltas, curvature = stack.dense(), call.curvature
    flat = None if curvature is None else curvature.reshape(*deltas.shape[:2], 1, -1)
    rows = DenseStack(deltas.reshape(*deltas.shape[:2], 1, -1))
    merged = product_of_experts(rows, energy, replace(call, curvature=flat, cut=None))
    shaped = Dense(merged.update.dense().reshape(-1, *stack.shape))
    return Merged(shaped, merged.certificates)
