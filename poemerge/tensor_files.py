"""Tensors in safetensors files, read one by one; without a word on the model that they make."""

import json
import math
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poemerge import documents
from poemerge.errors import CheckpointError
from poemerge.handles import Handle, open_handle
from poemerge.remote.ranges import RemoteHandle

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
AXES = 8  # of a tensor; no library computes with many more
Rows = tuple[int, int]  # first row, and the one after the last
ROWS = 4096  # read at a time where two tensors are compared


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """False for integer and boolean buffers, which are copied and never merged."""
        return self.dtype.is_floating_point


class TensorFiles:
    """Named tensors spread over one or more safetensors files of one folder.

    The library checks the headers. Values are read, not mapped: what is in memory is then what was
    asked for, and no more.
    """

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[str, Handle | RemoteHandle] = {}
        self._starts: dict[str, int] = {}  # tensor → where its bytes begin
        for file in files:
            self._add(file)
        self.tensors = dict(sorted(self.tensors.items()))

    def _add(self, file: str) -> None:
        path = self.folder / file
        with _open(path) as header:
            names = header.keys()
            self.tensors |= {name: _info(path, name, header.get_slice(name)) for name in names}
        self._handles[file] = open_handle(path)
        self._starts |= _starts(self._handles[file])

    def read(self, name: str, rows: Rows | None = None, *, pinned: bool = False) -> Tensor:
        """One tensor, or some of its rows, in its stored dtype, on the CPU.

        Args:
            name: of the tensor.
            rows: of a tensor with one axis at least; all if None.
            pinned: in memory that a GPU can fetch from by itself.

        Raises:
            CheckpointError: the file ends too early, having changed since it was opened.
        """
        info = self.tensors[name]
        start, shape = self._starts[name], info.shape
        if rows is not None:
            start += rows[0] * math.prod(shape[1:]) * info.dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        tensor = torch.empty(shape, dtype=info.dtype, pin_memory=pinned)
        if tensor.numel():
            target = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            self._handles[info.file].read(target, start)
        return tensor

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """True if two matrices of one shape hold the same numbers; read some rows at a time."""
        starts = range(0, one.shape[0], ROWS)
        cuts = ((start, min(start + ROWS, one.shape[0])) for start in starts)
        return all(
            torch.equal(self.read(one.name, cut), self.read(other.name, cut)) for cut in cuts
        )

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._handles.values():
            handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> Any:
    try:
        documents.check_file(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no intact safetensors file ({error}); fetch it again."
        ) from error
    except MemoryError as error:  # the library maps a file before it looks into it
        raise CheckpointError(
            f"{path} is larger than what this process may map into memory; raise the limit "
            "(`ulimit -v`), or fetch it again if it should be smaller."
        ) from error


def _starts(handle: Handle | RemoteHandle) -> dict[str, int]:
    """Where each tensor's bytes begin, from a header that the library has checked."""
    length = bytearray(8)
    handle.read(memoryview(length), 0)
    size = int.from_bytes(length, "little")
    text = bytearray(size)
    handle.read(memoryview(text), 8)
    header = json.loads(text)
    return {n: 8 + size + e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}


def _info(path: Path, name: str, header: Any) -> TensorInfo:
    stored = header.get_dtype()
    dtype = DTYPES.get(stored)
    if stored.startswith("C"):
        raise CheckpointError(
            f"{name} in {path} holds complex numbers ({stored}), which are not merged; store their "
            "real and imaginary parts as two tensors."
        )
    if dtype is None or (name.endswith(".weight") and dtype in {torch.int8, torch.uint8}):
        raise CheckpointError(
            f"{name} in {path} is stored as {stored}, a quantised format; merge the "
            "unquantised checkpoint."
        )
    shape = tuple(header.get_shape())
    if len(shape) > AXES or max(shape, default=0) > sys.maxsize:
        raise CheckpointError(
            f"{name} in {path} has the shape {reprlib.repr(shape)}; fetch it again, or take it out."
        )
    return TensorInfo(name, shape, dtype, path.name)
