"""A product of experts over a stack of task vectors: from settings to mode and certificate."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from poemerge.method import Call, Cut, Merged, Posterior, Sampling
from poemerge.poe.certificate import combine
from poemerge.poe.experts import PRECISIONS
from poemerge.poe.pieces import Pieces, cut_up
from poemerge.poe.settings import ProductSettings
from poemerge.poe.solver import Energy, pose, solve_matrices
from poemerge.posterior.draws import posterior_of, summarise
from poemerge.task_vector import DenseStack, Stack, StreamedStack
from poemerge.update import Dense, Update


def product_of_experts(stack: Stack | StreamedStack, energy: Energy, call: Call) -> Merged:
    """Solve every tensor of the stack for the mode of its product of experts.

    Args:
        stack: task vectors of B matrices (O, I); of any shape where the precision is entrywise.
        energy: what the experts' disagreement costs.
        call: weights of the experts, their curvature, and the pieces to cut matrices into.

    Raises:
        NumericalError: a system has no unique solution, even in fp64.
    """
    if len(stack.shape) != 2:
        assert not isinstance(stack, StreamedStack)
        return _as_rows(stack, energy, call)
    if call.cut is None:
        call = replace(call, cut=_blocks(stack, energy.settings))
    turned = energy.settings.acts_on == "input"
    precision = PRECISIONS[energy.settings.precision]
    pieces = cut_up(stack.mT if turned else stack, call, precision, turned=turned)
    solved = [solve_matrices(energy, problem) for problem in pieces.problems]

    def join(answers: Sequence[Tensor]) -> Update:
        update = pieces.join(answers)
        return update.mT if turned else update

    modes = [merged for merged, _ in solved]
    certificates = map(combine, pieces.sort([found for _, found in solved]))
    posterior = _posterior(energy, pieces, modes, join, call.sampling) if call.sampling else None
    return Merged(join(modes), tuple(c.as_dict() for c in certificates), posterior)


def _posterior(
    energy: Energy,
    pieces: Pieces,
    modes: Sequence[Tensor],
    join: Callable[[Sequence[Tensor]], Update],
    sampling: Sampling,
) -> Posterior:
    """What is known of the stack beside its modes; drawn piece by piece."""
    found = [
        posterior_of(pose(energy, problem.double()), mode.double(), problem.seeds, sampling)
        for problem, mode in zip(pieces.problems, modes, strict=True)
    ]
    facts = tuple(map(summarise, pieces.sort([one.facts for one in found])))
    draws = zip(*(one.draws for one in found), strict=True)
    return Posterior(facts, map(join, draws))


def _blocks(stack: Stack | StreamedStack, settings: ProductSettings) -> Cut | None:
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

    def shape(update: Update) -> Update:
        return Dense(update.dense().reshape(-1, *stack.shape))

    return merged.mapped(shape)
