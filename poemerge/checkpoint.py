"""A checkpoint on disk: a folder of safetensors, single or sharded, read tensor by tensor."""

import json
import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poemerge import documents
from poemerge.errors import CheckpointError, SourceError
from poemerge.handles import Handle, open_handle
from poemerge.layout import INDEX, SINGLE
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


# What is asked of a config, and what it must be where it is there.
CONFIG = {
    "_name_or_path": str,
    "architectures": list,
    "is_encoder_decoder": bool,
    "model_type": str,
    "text_config": dict,
    "tie_word_embeddings": bool,
    "vocab_size": int,
}
AXES = 8  # of a tensor; no library computes with many more


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


Rows = tuple[int, int]  # first row, and the one after the last
ROWS = 4096  # read at a time where two tensors are compared


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


class Checkpoint(TensorFiles):
    """A model checkpoint: weights and, where present, its config.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        SourceError: there is no such folder, or no weights in it.
        CheckpointError: a file is truncated, corrupt or quantised, or an index leaves the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise SourceError(f"{folder} is not a folder; give a checkpoint or an adapter folder.")
        self.config = read_json(folder / "config.json")
        if "quantization_config" in self.config:
            raise CheckpointError(
                f"{folder} is quantised (quantization_config in config.json); merge the "
                "unquantised checkpoint, or a .gguf file, which is dequantised on request."
            )
        _check_config(folder / "config.json", self.config)
        super().__init__(folder, weight_files(folder))
        self._check_index()

    @cached_property
    def index(self) -> Mapping[str, str]:
        """Tensor name → shard; empty for a single file."""
        return _weight_map(self.folder / INDEX) if documents.is_there(self.folder / INDEX) else {}

    @property
    def ties_embeddings(self) -> bool:
        """True if the config says that the output head is the input embedding."""
        return bool(self._text.get("tie_word_embeddings", self.config.get("tie_word_embeddings")))

    @property
    def vocabulary(self) -> int | None:
        """Rows of the vocabulary matrices as the config states them."""
        return self._text.get("vocab_size")

    @property
    def _text(self) -> Mapping[str, Any]:
        """The part of the config that is about text, where the model has others."""
        return self.config.get("text_config") or self.config

    def _check_index(self) -> None:
        for name, file in self.index.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.folder / INDEX} promises {name} in {file}, which does not hold it; "
                    "fetch the checkpoint again."
                )


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that make up the checkpoint in `folder`, sorted."""
    if documents.is_there(folder / INDEX):
        files = sorted(set(_weight_map(folder / INDEX).values()))
        for file in files:
            _check_inside(folder, file)
        return tuple(files)
    if (folder / SINGLE).exists():
        return (SINGLE,)
    raise SourceError(
        f"{folder} holds neither {SINGLE} nor {INDEX} nor adapter_config.json; "
        "`poemerge merge` converts .bin and .gguf files, other formats must be converted first."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    if not documents.is_there(path):
        return {}
    try:
        value = documents.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object; fetch it again.")
    return value


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """See that what is asked of a config later on is of the type that transformers gives it."""
    for name, kind in CONFIG.items():
        value = config.get(name)
        if value is not None and type(value) is not kind:
            raise CheckpointError(
                f"{path} has {name}={reprlib.repr(value)}, where transformers has a "
                f"{kind.__name__}; fetch it again."
            )
    if text := config.get("text_config"):
        _check_config(path, text)


def _weight_map(index: Path) -> Mapping[str, str]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(f, str) for f in entries.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; fetch it again.")
    return entries


def _check_inside(folder: Path, file: str) -> None:
    if Path(file).name != file:
        raise CheckpointError(
            f"{folder / INDEX} names {file}, which is outside its folder; this index is not to be "
            "trusted."
        )
    try:
        documents.check_file(folder / file)
    except (OSError, ValueError) as error:
        message = f"{folder / file} is missing (named in {INDEX}); fetch it again."
        raise CheckpointError(message) from error


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
