"""What a planned merge will take: floating-point operations and bytes, over rates measured now."""

import hashlib
import time
from collections.abc import Callable

import torch

from poemerge.merging.groups import Group
from poemerge.merging.plan import Plan
from poemerge.poe.solver import SMALL
from poemerge.rules import FORMULA, MATRIX, VOCABULARY

STEPS = 8  # reweightings that a heavy-tailed solve is counted with
PASSES = 12  # over an update, by an elementwise method
PROBE = 768  # side of the matrix product that measures arithmetic
PROBE_BYTES = 16 << 20


def estimate_seconds(plan: Plan, device: torch.device) -> float:
    """Wall seconds of executing `plan` on `device`, to within a factor of about two.

    Reading, hashing and writing are counted at the rate at which this machine hashes.
    """
    seconds = 0.0
    for dtype in (torch.float32, torch.float64):
        flops = sum(_flops(group, plan) for group in plan.groups if _dtype(group, plan) == dtype)
        seconds += flops / _flop_rate(device, dtype) if flops else 0.0
    passes = sum(len(group.tensors) * _pass_bytes(group, plan) for group in plan.groups)
    total = plan.read_bytes + 2 * sum(info.bytes for info in plan.base.tensors.values())
    return seconds + passes / _pass_rate(device) + total / _hash_rate()


def _dtype(group: Group, plan: Plan) -> torch.dtype:
    """In which its matrices are solved."""
    small = min(group.shape, default=0) <= SMALL
    is_exact = small or group.in_factors or plan.method.work is not None
    return torch.float64 if is_exact else torch.float32


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
    steps = STEPS if hasattr(plan.settings, "max_steps") else 1
    return factor + forms + steps * (4.0 * side**2 * other + side**3 / 3)


def _pass_bytes(group: Group, plan: Plan) -> float:
    """Memory traffic of one tensor: base and result, and the updates of elementwise methods."""
    size = 4.0 * group.size
    elementwise = group.rule == FORMULA and not plan.method.factors(plan.settings)
    return size * (6 + (PASSES * len(group.voters) if elementwise else 2 * len(group.voters)))


def _flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(PROBE, PROBE, dtype=dtype, device=device)
    return 2.0 * PROBE**3 / _seconds(lambda: float((matrix @ matrix)[0, 0]))


def _pass_rate(device: torch.device) -> float:
    vector = torch.ones(PROBE_BYTES // 4, device=device)
    return 2.0 * PROBE_BYTES / _seconds(lambda: float((vector + vector)[0]))


def _hash_rate() -> float:
    data = bytes(PROBE_BYTES)
    return PROBE_BYTES / _seconds(lambda: hashlib.sha256(data).digest())


def _seconds(probe: Callable[[], object]) -> float:
    """Best of three: the machine's rate, not its mood."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        probe()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
