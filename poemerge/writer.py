"""A safetensors file written tensor by tensor, so that no shard is ever held in memory.

The layout is known beforehand (shapes and dtypes are), so the header goes first and each tensor to
its offset, in any order. Format: 8 bytes header length, JSON header, row-major little endian bytes.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from poemerge.tensor_files import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8


class ShardWriter:
    """One safetensors file under construction; use as a context.

    Args:
        path: the file to make; the folder around it is put in place as a whole (atomic.py).
        layout: tensor name → (shape, dtype).
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        # Wide dtypes first keeps every tensor aligned to its item size.
        order = sorted(layout, key=lambda name: (-layout[name][1].itemsize, name))
        self._dtypes = {name: layout[name][1] for name in order}
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            shape, dtype = layout[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self._spans[name] = (start, end)
        header = _header({n: (layout[n][0], layout[n][1], self._spans[n]) for n in order})
        self._start = len(header)
        self._stream = path.open("wb", buffering=0)
        try:
            self._put(0, header)
            self._stream.truncate(self._start + end)
        except OSError:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Put a tensor, or rows of it from `row` on, at its place, cast to the layout's dtype."""
        data = tensor.detach().to(self._dtypes[name]).to("cpu").contiguous().flatten()
        per_row = data.nbytes // tensor.shape[0] if row else 0
        start = self._start + self._spans[name][0] + row * per_row
        self._put(start, data.view(torch.uint8).numpy().data)

    def _put(self, start: int, data: bytes | memoryview) -> None:
        """Write all of it: one call takes 2 GB at most."""
        self._stream.seek(start)
        left = memoryview(data)
        while left:
            left = left[self._stream.write(left) :]

    def close(self) -> None:
        """Nothing more will be written."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(
    entries: Mapping[str, tuple[tuple[int, ...], torch.dtype, tuple[int, int]]],
) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (shape, dtype, span) in entries.items():
        table[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": span}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
