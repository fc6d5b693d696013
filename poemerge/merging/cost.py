"""What merging a planned group takes: bytes through disk and memory, floating-point operations."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Self

from poemerge.merging.groups import Group
from poemerge.merging.plan import Plan
from poemerge.poe.solver import SMALL
from poemerge.rules import COPY, FORMULA, MATRIX, TIED, VOCABULARY
from poemerge.spectrum import QR
from poemerge.tensor_files import TensorInfo

STEPS = 6  # reweightings of a heavy-tailed solve; adapters take 2, others up to 12
ROUNDS_AROUND = 2  # over a system, beside one a step: the start, and the certificate
PASSES_AROUND = 5  # over experts that come one by one, beside two a step
PASSES_ROUND = 4  # over precisions and targets of all experts
CHOLESKY = 5  # a factorisation's operations in those of a matrix product; measured on CPUs
BACKWARD = 1.5  # likewise of solving with it


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes; costs add up.

    Attributes:
        read: bytes of the base and of the experts, as they are stored.
        written: bytes of the merged weights.
        single: floating-point operations in fp32, in those of a matrix product (a factorisation
            counts several times).
        double: in fp64.
        traffic: bytes through the memory, beside those operations.
        tensors: of base and experts, that are found, looked at and entered in the records.
    """

    read: float = 0.0
    written: float = 0.0
    single: float = 0.0
    double: float = 0.0
    traffic: float = 0.0
    tensors: float = 0.0

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
    """Of all tensors of a group; benchmarks/foreseen.py compares it with what merges take."""
    if group.rule == TIED:
        return Cost()
    size = sum(info.bytes for info in group.tensors)
    stored = sum(_stored(info, group, plan) for info in group.tensors)
    read = size + stored * (PASSES_AROUND + 2 * _steps(plan) if group.streamed else 1)
    tensors = len(group.tensors)
    flops, traffic = (tensors * each for each in _effort(group, plan))
    rest = Cost(read, size, traffic=traffic, tensors=tensors * (1 + len(group.voters)))
    return rest + (Cost(double=flops) if _is_exact(group, plan) else Cost(single=flops))


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


def _effort(group: Group, plan: Plan) -> tuple[float, float]:
    """Operations and traffic of one tensor: base and result, the experts' updates, the method."""
    voters = len(group.voters)
    traffic = 4.0 * group.size * (6 + 2 * voters)
    if group.rule == FORMULA:
        return 0.0, traffic + 4.0 * group.size * voters * plan.method.passes
    if group.rule not in {MATRIX, VOCABULARY}:
        return 0.0, traffic
    if plan.method.work is not None:
        return plan.method.work(group.matrix).flops, traffic
    flops, around = _product(group, plan)
    return flops, traffic + around


def _product(group: Group, plan: Plan) -> tuple[float, float]:
    """Operations and traffic of one matrix, solved as a product of experts."""
    rows, columns = group.shape
    feature = group.rule == VOCABULARY or getattr(plan.settings, "acts_on", "") == "input"
    side, other = (columns, rows) if feature else (rows, columns)
    factor = 0.0
    if group.in_factors:
        rank = group.joint_rank
        factor = 4.0 * QR * (rows + columns) * rank**2 + 2.0 * rows * columns * rank
        side, other = min(side, rank), min(other, rank)
    voters, steps = len(group.voters), _steps(plan)
    forms = 4.0 * voters * side**2 * other
    if group.streamed:
        forms *= PASSES_AROUND + 2 * steps
    rounds = ROUNDS_AROUND + steps
    solves = rounds * ((2 + 2 * BACKWARD) * side**2 * other + CHOLESKY * side**3 / 3)
    entries = voters * side * (side + other) * (2 if _is_exact(group, plan) else 1)
    return factor + forms + solves, 4.0 * entries * rounds * PASSES_ROUND


def _steps(plan: Plan) -> int:
    return STEPS if hasattr(plan.settings, "max_steps") else 0
