"""What merging a planned group takes: bytes through disk and memory, floating-point operations."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Self

from poemerge.checkpoint import TensorInfo
from poemerge.merging.groups import Group
from poemerge.merging.plan import Plan
from poemerge.poe.solver import SMALL
from poemerge.rules import COPY, FORMULA, MATRIX, TIED, VOCABULARY

STEPS = 8  # reweightings that a heavy-tailed solve is counted with
PASSES_AROUND = 4  # over experts that come one by one, beside two a step
PASSES = 12  # over an update, by an elementwise method


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes; costs add up.

    Attributes:
        read: bytes of the base and of the experts, as they are stored.
        written: bytes of the merged weights.
        single: floating-point operations in fp32.
        double: in fp64.
        traffic: bytes through the memory, beside those operations.
    """

    read: float = 0.0
    written: float = 0.0
    single: float = 0.0
    double: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def sum(cls, costs: Iterable[Self]) -> Self:
        """Of no costs, nothing."""
        total = cls()
        for cost in costs:
            total += cost
        return total


def cost_of(group: Group, plan: Plan) -> Cost:
    """Of all tensors of a group, to within a factor of about two."""
    if group.rule == TIED:
        return Cost()
    size = sum(info.bytes for info in group.tensors)
    stored = sum(_stored(info, group, plan) for info in group.tensors)
    read = size + stored * (PASSES_AROUND + 2 * _steps(plan) if group.streamed else 1)
    flops, traffic = _flops(group, plan), len(group.tensors) * _traffic(group, plan)
    if _is_exact(group, plan):
        return Cost(read, size, double=flops, traffic=traffic)
    return Cost(read, size, single=flops, traffic=traffic)


def _stored(info: TensorInfo, group: Group, plan: Plan) -> int:
    """Bytes of the voters' weights or factors of one tensor, on disk."""
    total = 0
    for voter in group.voters if group.rule != COPY else ():
        expert = plan.experts[voter]
        rank = expert.rank(info)
        entries = group.size if rank is None else rank * sum(group.shape)
        total += entries * expert.stored(info).itemsize
    return total


def _is_exact(group: Group, plan: Plan) -> bool:
    """True if its matrices are solved in fp64."""
    small = min(group.shape, default=0) <= SMALL
    return small or group.in_factors or plan.method.work is not None


def _flops(group: Group, plan: Plan) -> float:
    """Of all tensors of the group."""
    if group.rule not in {MATRIX, VOCABULARY}:
        return 0.0
    if plan.method.work is not None:
        return len(group.tensors) * plan.method.work(group.matrix).flops
    return len(group.tensors) * _product_flops(group, plan)


def _product_flops(group: Group, plan: Plan) -> float:
    """Of one matrix, solved as a product of experts."""
    rows, columns = group.shape
    feature = group.rule == VOCABULARY or getattr(plan.settings, "acts_on", "") == "input"
    side, other = (columns, rows) if feature else (rows, columns)
    factor = 0.0
    if group.in_factors:
        rank = group.joint_rank
        factor = 4.0 * (rows + columns) * rank**2 + 2.0 * rows * columns * rank
        side, other = min(side, rank), min(other, rank)
    forms = 4.0 * len(group.voters) * side**2 * other
    steps = _steps(plan)
    if group.streamed:
        forms *= PASSES_AROUND + 2 * steps
    return factor + forms + steps * (4.0 * side**2 * other + side**3 / 3)


def _steps(plan: Plan) -> int:
    return STEPS if hasattr(plan.settings, "max_steps") else 1


def _traffic(group: Group, plan: Plan) -> float:
    """Of one tensor: base and result, and the updates of elementwise methods."""
    size = 4.0 * group.size
    elementwise = group.rule == FORMULA and not plan.method.factors(plan.settings)
    return size * (6 + (PASSES * len(group.voters) if elementwise else 2 * len(group.voters)))
