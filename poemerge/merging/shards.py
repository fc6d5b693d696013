"""The output's shards, written behind while the next batch is computed."""

import math
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from poemerge.atomic import PARTIAL, write_json
from poemerge.errors import NumericalError
from poemerge.layout import INDEX
from poemerge.merging.plan import Plan
from poemerge.merging.stream import BEHIND, Behind
from poemerge.report import TensorReport
from poemerge.rules import TIED
from poemerge.tensor_files import TensorInfo
from poemerge.writer import ShardWriter


@dataclass(frozen=True)
class Shard:
    """A file of weights that is complete: what is known of it wherever it was made.

    Attributes:
        file: its name.
        sha256: of its bytes.
        tensors: what was done to each in it.
        spilled: names of those that the GPU had no room for.
        tag: that a storage elsewhere gave it, where a worker has brought it there.
    """

    file: str
    sha256: str
    tensors: tuple[TensorReport, ...]
    spilled: tuple[str, ...] = ()
    tag: str = ""


class Shards:
    """The base's shards anew; use as a context. Tensors come file by file.

    Args:
        folder: where to.
        plan: says which tensor lies in which file.
        dtype_of: stored dtype of a base dtype.
        waiting: writes that may wait.
        finished: called with the name of every shard that is complete, behind too.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        dtype_of: Callable[[torch.dtype], torch.dtype],
        waiting: int = BEHIND,
        finished: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder, self.plan, self.dtype_of = folder, plan, dtype_of
        self._layout = _layout(plan, dtype_of)
        self._attempt = secrets.token_hex(4)  # two may be at one shard: the first was given up
        self._behind, self._finished = Behind(waiting), finished
        self._current: tuple[str, ShardWriter] | None = None
        self._writers = ExitStack()

    def write(self, info: TensorInfo, tensor: Tensor, row: int = 0) -> None:
        """Put a tensor, or rows of it from `row` on, in its place, soon.

        Raises:
            NumericalError: an earlier one does not fit into the stored dtype.
        """
        self._behind.call(self._store, self._writer(info.file), info, tensor, row)

    def _store(self, writer: ShardWriter, info: TensorInfo, tensor: Tensor, row: int) -> None:
        dtype = self.dtype_of(info.dtype)
        if dtype.is_floating_point and tensor.numel():
            low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 2 else tensor.float())
            if not float(torch.maximum(-low, high)) <= torch.finfo(dtype).max:
                raise NumericalError(
                    f"{info.name} of the merge does not fit into {dtype}; choose another `dtype`, "
                    "or lower `strength`."
                )
        writer.write(info.name, tensor, row)

    def _writer(self, file: str) -> ShardWriter:
        if self._current is None or self._current[0] != file:
            self._finish()
            own = {n: (shape, dtype) for n, (f, shape, dtype) in self._layout.items() if f == file}
            self._current = (
                file,
                self._writers.enter_context(ShardWriter(self._unfinished(file), own)),
            )
        return self._current[1]

    def _unfinished(self, file: str) -> Path:
        return self.folder / f"{file}.{self._attempt}{PARTIAL}"

    def _finish(self) -> None:
        """Nothing more is written into the current shard."""
        if self._current is not None:
            self._behind.call(self._put, *self._current)

    def _put(self, file: str, writer: ShardWriter) -> None:
        writer.close()
        self._unfinished(file).rename(self.folder / file)
        self._finished(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._writers:
            if kind is None:
                with self._behind:
                    self._finish()
            else:
                self._behind.__exit__(kind, *rest)


def write_index(folder: Path, plan: Plan, dtype_of: Callable[[torch.dtype], torch.dtype]) -> None:
    """Say which tensor lies in which shard, as the base does, once all of them are there."""
    if not plan.base.index:
        return
    layout = _layout(plan, dtype_of)
    size = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in layout.values())
    placed = {name: file for name, (file, *_) in sorted(layout.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})


def _layout(
    plan: Plan, dtype_of: Callable[[torch.dtype], torch.dtype]
) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """Tensor name → file, shape and stored dtype."""
    infos = [info for group in plan.groups if group.rule != TIED for info in group.tensors]
    return {i.name: (i.file, plan.shape(i), dtype_of(i.dtype)) for i in infos}
