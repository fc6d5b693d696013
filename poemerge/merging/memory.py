"""What a planned merge holds in memory at its peak, and batches that keep a budget."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from poemerge.errors import MachineError, SettingError
from poemerge.merging.groups import Batch, Group
from poemerge.merging.stream import BEHIND
from poemerge.method import Method
from poemerge.poe.solver import SMALL
from poemerge.rules import COPY, FORMULA, MATRIX, TIED, VOCABULARY
from poemerge.settings import Settings

CUDA_LIBRARIES = 300 << 20  # which a torch that is built for GPUs loads, even to merge on the CPU
OVERHEAD = 330 << 20  # Python, torch, its threads' buffers, and the files' headers
OVERHEAD += CUDA_LIBRARIES if torch.version.cuda else 0
LIMITS = {"cpu": 32 << 20, "cuda": 1 << 30}  # loaded bytes of a batch
SHARE = 16  # of a GPU's memory that one loaded batch takes at most; solving it takes the rest
ROOM = {"cpu": 16 << 30, "cuda": 1 << 40}  # for one tensor, the experts together; else one by one
SLICE = 16 << 20  # likewise of rows that are merged apart, on a CPU: they stay in its caches
SMALLEST = 1 << 20  # of a batch, however tight the budget
SAFE_RIDGE = 1e-3  # relative; above it fp32 suffices, so that no matrix is solved twice
ELEMENTWISE_COPIES = 3  # of the updates, by a method that says nothing better of itself


def batch_bytes(method: Method, device: torch.device, limit: int | None = None) -> int:
    """Loaded bytes of a batch: those of the device, or what a budget has left of them."""
    usual = LIMITS[device.type]
    if device.type == "cuda":
        usual = min(usual, torch.cuda.get_device_properties(device).total_memory // SHARE)
    if device.type == "cpu" and method.local and method.prepare is None:
        usual = SLICE
    return min(usual, limit or usual)


def fit(
    groups: Sequence[Group],
    method: Method,
    settings: Settings,
    device: torch.device,
    budget: int,
    *,
    sampled: bool = False,
) -> int:
    """Largest loaded bytes of a batch that keep the peak within `budget` bytes.

    Raises:
        SettingError: even the smallest batches need more.
    """
    limit = LIMITS[device.type]
    while limit >= SMALLEST:
        loaded = batch_bytes(method, device, limit)
        if peak_bytes(groups, method, settings, loaded, sampled=sampled) <= budget:
            return limit
        limit //= 2
    least = peak_bytes(groups, method, settings, SMALLEST, sampled=sampled)
    raise SettingError(
        f"memory is {budget / 1e9:.2f} GB, but the largest tensor group needs "
        f"{least / 1e9:.2f} GB; allow that much, or choose a method that merges rows apart "
        "(average, task_arithmetic, ties)."
    )


def streamed(
    groups: Sequence[Group],
    method: Method,
    settings: Settings,
    device: torch.device,
    budget: int | None,
) -> tuple[Group, ...]:
    """The groups, with those marked whose experts do not fit together and may come one by one."""
    room = ROOM[device.type] if budget is None else budget - OVERHEAD
    if device.type == "cuda" and budget is None:
        room = min(room, torch.cuda.get_device_properties(device).total_memory * 3 // 4)

    def mark(group: Group) -> Group:
        if not _may_stream(group, settings):
            return group
        together = replace(group, streamed=False)  # whatever another budget asked for
        first = next(together.batches(SMALLEST, local=False))
        return replace(group, streamed=_batch_peak(first, method, settings, 0) > room)

    return tuple(map(mark, groups))


def _may_stream(group: Group, settings: Settings) -> bool:
    dense = bool(group.voters) and all(rank is None for rank in group.ranks)
    solved = group.rule in {MATRIX, VOCABULARY} and group.cut is None
    return dense and solved and getattr(settings, "streams", False)


def peak_bytes(
    groups: Sequence[Group],
    method: Method,
    settings: Settings,
    limit: int,
    *,
    sampled: bool = False,
) -> int:
    """Estimate of the largest resident memory of the whole process."""
    every = sum(len(group.tensors) * group.loaded_bytes for group in groups)
    largest, ahead = 0, min(limit, every)
    for group in groups:
        if group.rule == TIED:
            continue
        for batch in group.batches(limit, local=method.local):
            peak = _batch_peak(batch, method, settings, ahead)
            largest = max(largest, peak + (_posterior_bytes(batch) if sampled else 0))
            break  # the first batch of a group is the largest
    return OVERHEAD + largest


def give_back() -> None:
    """Return what is free to the system: the C library would keep it, and count it as resident."""
    with suppress(OSError, AttributeError):  # another C library has other ways
        ctypes.CDLL(None).malloc_trim(0)


def is_shortage(error: BaseException) -> bool:
    """True if an allocation failed; on a CPU torch has no class of its own for that."""
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextmanager
def shortages(tensor: str) -> Iterator[None]:
    """Say in a sentence that memory does not suffice.

    Args:
        tensor: name of what the block works on.

    Raises:
        MachineError: it does not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        message = (
            f"There is no memory for {tensor}; set `memory` to what is free, end other programs, "
            "or choose a method that merges rows apart (average, task_arithmetic, ties)."
        )
        raise MachineError(message) from error


def _batch_peak(batch: Batch, method: Method, settings: Settings, ahead: int) -> int:
    """This batch in use, the next read ahead if it is small, the last written behind."""
    part, count = batch.as_group, len(batch.tensors)
    raw = max(info.dtype.itemsize for info in batch.tensors) * part.size
    written = (BEHIND + 1) * (4 * part.size + raw)
    if part.rule == COPY:
        return count * 2 * raw + written
    if part.streamed:
        return _streamed_bytes(part, settings) + raw + written
    loaded = count * part.loaded_bytes + ahead + raw
    if batch.rows is not None and method.prepare is not None:
        whole = batch.group.size // max(1, part.size)
        loaded += 4 * batch.group.size + 2 * whole * raw
    return loaded + written + _work_bytes(part, count, method, settings)


def _work_bytes(group: Group, count: int, method: Method, settings: Settings) -> int:
    """What a method holds beside the loaded batch, the result included."""
    result = 4 * group.size
    if group.rule in {MATRIX, VOCABULARY}:
        if method.work is not None:
            return count * (method.work(group.matrix).bytes + result)
        return _product_bytes(group, count, settings) + count * result
    if group.rule == FORMULA and not method.local and not method.factors(settings):
        return count * (ELEMENTWISE_COPIES * group.update_bytes + result)
    return 2 * count * result


def _product_bytes(group: Group, count: int, settings: Settings) -> int:
    """Forms and modes of a product of experts."""
    experts = len(group.voters)
    side = getattr(settings, "acts_on", "output")
    feature = group.rule == VOCABULARY or side == "input"
    rows = group.shape[feature]
    columns = group.size // rows if rows else 0
    if group.in_factors:
        rank = group.joint_rank
        factors = 3 * 8 * sum(group.shape) * rank
        return count * (factors + 8 * (4 * experts + 8) * min(rank, rows) * min(rank, columns))

    def solved(word: int) -> int:
        work = (experts + 5) * group.size + (experts + 4 * _pieces(group, settings)) * rows * rows
        return word * work

    exact = solved(8) + 8 * experts * group.size
    if rows <= SMALL:
        return count * exact
    relative = getattr(settings, "ridge_mode", "") == "relative"
    is_safe = relative and getattr(settings, "ridge", 0.0) >= SAFE_RIDGE
    return count * solved(4) if is_safe else max(count * solved(4), exact)


def _streamed_bytes(group: Group, settings: Settings) -> int:
    """The base and one expert; a system in fp64 with its right-hand side, and a few modes."""
    feature = group.rule == VOCABULARY or getattr(settings, "acts_on", "output") == "input"
    rows = group.shape[feature]
    return 4 * 4 * group.size + 8 * (6 * group.size + 6 * rows**2)


def _posterior_bytes(batch: Batch) -> int:
    """Forms and directions of all experts in fp64, a draw with its noise, and the base again."""
    group, count = batch.as_group, len(batch.tensors)
    if group.rule not in {MATRIX, VOCABULARY, FORMULA}:
        return 4 * count * group.size
    experts, spare = len(group.voters), 2 * 4 * group.size
    if group.in_factors:
        rank = group.joint_rank
        inner = min(rank, group.shape[0]) * min(rank, group.shape[1])
        return count * (8 * (6 * experts + 8) * inner + spare)
    side = min(group.shape[-2:]) if len(group.shape) > 1 else 1
    return count * (8 * ((4 * experts + 8) * group.size + (experts + 3) * side**2) + spare)


def _pieces(group: Group, settings: Settings) -> int:
    """Systems that are held at once for a matrix: one for each piece."""
    if group.cut is not None:
        return len(group.cut.sizes)
    if getattr(settings, "granularity", "") == "rows" and group.rule == MATRIX:
        return -(-group.shape[0] // getattr(settings, "block_rows", 1))
    return 1
