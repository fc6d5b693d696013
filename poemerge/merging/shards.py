"""The output's shards, written behind while the next batch is computed."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from poemerge.atomic import write_json
from poemerge.checkpoint import TensorInfo
from poemerge.errors import NumericalError
from poemerge.layout import INDEX
from poemerge.merging.plan import Plan
from poemerge.merging.stream import BEHIND, Behind
from poemerge.rules import TIED
from poemerge.writer import ShardWriter


class Shards:
    """The base's shards anew; use as a context. Tensors come file by file.

    Args:
        folder: where to.
        plan: says which tensor lies in which file.
        dtype_of: stored dtype of a base dtype.
        waiting: writes that may wait.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        dtype_of: Callable[[torch.dtype], torch.dtype],
        waiting: int = BEHIND,
    ) -> None:
        self.folder, self.plan, self.dtype_of = folder, plan, dtype_of
        infos = [i for group in plan.groups if group.rule != TIED for i in group.tensors]
        self._layout = {i.name: (i.file, plan.shape(i), dtype_of(i.dtype)) for i in infos}
        self._behind = Behind(waiting)
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
            if self._current is not None:
                self._behind.call(self._current[1].close)
            own = {n: (shape, dtype) for n, (f, shape, dtype) in self._layout.items() if f == file}
            self._current = (
                file,
                self._writers.enter_context(ShardWriter(self.folder / file, own)),
            )
        return self._current[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._writers:
            self._behind.__exit__(kind, *rest)
        if kind is None and self.plan.base.index:
            size = sum(math.prod(s) * d.itemsize for _, s, d in self._layout.values())
            placed = {name: file for name, (file, *_) in sorted(self._layout.items())}
            write_json(
                self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed}
            )
