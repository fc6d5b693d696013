"""From files to a stack of task vectors on the device: read, convert, subtract."""

from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.errors import CheckpointError
from poemerge.experts import Expert
from poemerge.experts.values import check_finite, is_finite
from poemerge.merging.groups import Batch
from poemerge.merging.memory import shortages
from poemerge.merging.plan import Plan
from poemerge.rules import COPY
from poemerge.task_vector import DenseStack, LowRankStack, Stack, StreamedStack
from poemerge.tensor_files import TensorInfo
from poemerge.update import LowRank

CPU = torch.device("cpu")


@dataclass
class Loaded:
    """A batch in memory.

    Attributes:
        base: weights (B, *shape), fp32; of tensors that are copied, one by one as they are stored.
        stack: the voters' updates, or None where tensors are copied.
        squares: ||A_i||² (B, E), fp64.
        curvature: of the voters, where the method needs it.
        prepared: what the method wants to know of whole tensors (B, E), where rows are merged
            apart.
        ready: on a GPU, when all this has arrived.
    """

    base: Tensor | tuple[Tensor, ...]
    stack: Stack | StreamedStack | None = None
    squares: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    curvature: Tensor | None = None
    prepared: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def release(self) -> None:
        """Let go of all memory."""
        self.base, self.stack, self.curvature = (), None, None

    def wait(self) -> None:
        """Let what follows on the current stream of a GPU wait for the copies."""
        if self.ready is not None:
            self.ready.wait()


class Loader:
    """Loads the batches of a plan; a GPU gets them over a stream of its own.

    Args:
        plan: with its files open.
        device: where to.
        with_base: False if the weights of the base are not wanted where updates are in factors.
    """

    def __init__(self, plan: Plan, device: torch.device, *, with_base: bool = True) -> None:
        self.plan, self.device, self.with_base = plan, device, with_base
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prepared: dict[str, Tensor] = {}

    def load(self, batch: Batch) -> Loaded:
        """Read a batch; onto the CPU if the GPU has no room for it.

        Raises:
            CheckpointError: a value is not finite.
            MachineError: the CPU has no room for it either.
        """
        with shortages(batch.tensors[0].name):
            return self._load_somewhere(batch)

    def _load_somewhere(self, batch: Batch) -> Loaded:
        if batch.group.rule == COPY:
            return Loaded(tuple(self._copy(info, batch) for info in batch.tensors))
        if self._stream is None:
            return self._load(batch)
        try:
            return self._load_aside(batch, self._stream)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
        return Loader(self.plan, CPU, with_base=self.with_base).load(batch)

    def _load_aside(self, batch: Batch, stream: torch.cuda.Stream) -> Loaded:
        """On a stream of its own, so that copies and computation overlap."""
        with torch.cuda.stream(stream):
            loaded = self._load(batch)
            loaded.ready = stream.record_event()
        for tensor in _tensors(loaded):
            tensor.record_stream(torch.cuda.default_stream(self.device))
        return loaded

    def _copy(self, info: TensorInfo, batch: Batch) -> Tensor:
        weight = self.plan.base.read(info.name, batch.rows)
        if info.is_float:
            check_finite(weight.float(), info.name, f"the base ({self.plan.base.folder})")
        return weight

    def _load(self, batch: Batch) -> Loaded:
        wanted = self.with_base or not batch.group.in_factors
        base = self._read_base(batch) if wanted else torch.empty(0, device=self.device)
        experts = [self.plan.experts[i] for i in batch.group.voters]
        stack: Stack | StreamedStack
        if batch.group.streamed:
            stack, squares = self._one_by_one(batch, experts, base)
        elif batch.group.in_factors:
            stack, squares = self._factors(batch, experts)
        else:
            stack, squares = self._dense(batch, experts, base)
        if not bool(squares.isfinite().all()):
            _blame(batch, experts, stack)
        loaded = Loaded(base, stack, squares)
        if batch.group.curvature:
            loaded.curvature = self.plan.curvature.read(batch.tensors, batch.group.voters).to(base)
        if batch.rows is not None and self.plan.method.prepare is not None:
            loaded.prepared = self._prepare(batch, experts)
        return loaded

    def _read_base(self, batch: Batch) -> Tensor:
        pinned = self._stream is not None
        base = torch.empty(len(batch.tensors), *batch.shape, device=self.device)
        for index, info in enumerate(batch.tensors):
            weight = self.plan.base.read(info.name, batch.rows, pinned=pinned)
            base[index].copy_(weight, non_blocking=pinned)
        if not bool(linalg.square_norm(base.flatten()).isfinite()):
            for index, info in enumerate(batch.tensors):
                check_finite(base[index], info.name, f"the base ({self.plan.base.folder})")
        return base

    def _dense(
        self, batch: Batch, experts: list[Expert], base: Tensor
    ) -> tuple[DenseStack, Tensor]:
        shape = (len(batch.tensors), len(experts), *batch.shape)
        deltas = torch.empty(shape, device=self.device)
        for (b, info), (e, expert) in product(enumerate(batch.tensors), enumerate(experts)):
            expert.fill(info, base[b], deltas[b, e], batch.rows)
        return DenseStack(deltas), linalg.square_norm(deltas.reshape(*shape[:2], -1))

    def _one_by_one(
        self, batch: Batch, experts: list[Expert], base: Tensor
    ) -> tuple[StreamedStack, Tensor]:
        """Experts that are read whenever they are needed, over the base that stays."""
        (info,) = batch.tensors

        def read(index: int) -> Tensor:
            update = torch.empty_like(base[0])
            experts[index].fill(info, base[0], update, None)
            return update

        stack = StreamedStack(read, len(experts), (info.shape[0], info.shape[1]))
        squares = [linalg.square_norm(update.flatten()) for update in stack.each()]
        return stack, torch.stack(squares).unsqueeze(0)

    def _factors(self, batch: Batch, experts: list[Expert]) -> tuple[LowRankStack, Tensor]:
        columns = [[expert.factors(info) for info in batch.tensors] for expert in experts]
        cut = slice(*batch.rows) if batch.rows is not None else slice(None)
        pinned = self._stream is not None

        def together(parts: list[Tensor]) -> Tensor:
            whole = torch.stack(parts).float()
            return whole.pin_memory().to(self.device, non_blocking=True) if pinned else whole

        stack = LowRankStack(
            tuple(together([both.up[cut] for both in column]) for column in columns),
            tuple(together([both.down for both in column]) for column in columns),
        )
        pairs = zip(stack.ups, stack.downs, strict=True)
        norms = [LowRank(up, down).norm() for up, down in pairs]
        return stack, torch.stack(norms, dim=1).square()

    def _prepare(self, batch: Batch, experts: list[Expert]) -> Tensor:
        """What the method wants to know of a whole tensor, which is read for it once more."""
        (info,) = batch.tensors
        if batch.is_first:
            self._prepared = {info.name: self._look(info, experts)}
        return self._prepared[info.name]

    def _look(self, info: TensorInfo, experts: list[Expert]) -> Tensor:
        prepare = self.plan.method.prepare
        assert prepare is not None
        base = self.plan.base.read(info.name).to(self.device)
        update, found = torch.empty(info.shape, device=self.device), []
        for expert in experts:
            expert.fill(info, base, update, None)
            found.append(prepare(update, self.plan.settings))
        return torch.stack(found).unsqueeze(0)


def _tensors(loaded: Loaded) -> list[Tensor]:
    """All that has come to the device."""
    assert isinstance(loaded.base, Tensor)
    stack = loaded.stack
    parts = [stack.deltas] if isinstance(stack, DenseStack) else []
    parts += [*stack.ups, *stack.downs] if isinstance(stack, LowRankStack) else []
    rest = (loaded.squares, loaded.curvature, loaded.prepared)
    return [loaded.base, *parts, *(tensor for tensor in rest if tensor is not None)]


def _blame(batch: Batch, experts: list[Expert], stack: Stack | StreamedStack) -> None:
    """Name the expert whose values are not finite; huge ones may only seem so."""
    for b, info in enumerate(batch.tensors):
        for e, expert in enumerate(experts):
            where = f"expert {expert.name!r} ({expert.folder})"
            if isinstance(stack, StreamedStack):
                check_finite(stack.read(e), info.name, where)
            elif isinstance(stack, DenseStack):
                check_finite(stack.deltas[b, e], info.name, where)
            else:
                check_finite(stack.ups[e][b], info.name, where)
                check_finite(stack.downs[e][b], info.name, where)
    each = stack.each() if isinstance(stack, StreamedStack) else [stack.dense()]
    if any(not is_finite(tensor) for tensor in each):
        raise CheckpointError(
            f"{batch.tensors[0].name} has updates beyond the range of fp32; scale them down."
        )
