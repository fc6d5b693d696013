"""The header of a .gguf file, walked through before a library believes it.

Counts and lengths that no file could hold make the readers of GGUF run for ever; what is named here
is there. Format (ggml, versions 2 and 3, little endian): magic, version, number of tensors, number
of facts; each fact a key, a type and a value; each tensor a name, its sizes, a type and an offset.
"""

import math
import mmap
import struct
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType

from poemerge.documents import check_file

VERSIONS = (2, 3)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
AXES = 4
LAYERS = "block_count"  # ends the key of a fact; a model is built with so many, whatever is there


class Header:
    """A header under way; each method takes what stands next.

    Args:
        data: the whole file.

    Raises:
        ValueError: something is claimed that the file does not hold.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0
        magic, version, tensors, facts = self.take("<IIQQ")
        if magic != GGUF_MAGIC or version not in VERSIONS:
            raise ValueError("it does not begin as GGUF does")
        self.layers = 0
        for _ in range(self.bounded(facts, 8)):
            self.fact()
        ends = [self.tensor() for _ in range(self.bounded(tensors, 8))]
        if max(ends, default=0) > len(data) - self.at:
            raise ValueError("a tensor ends beyond the file")
        if not 1 <= self.layers <= tensors:
            raise ValueError(f"it claims {self.layers} layers, and has {tensors} tensors")

    def take(self, form: str) -> tuple[int, ...]:
        """Numbers, as `struct` calls them."""
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)

    def skip(self, size: int) -> int:
        """Pass over bytes that must be there; where they began."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError("its header ends beyond the file")
        return start

    def bounded(self, count: int, size: int) -> int:
        """A number of things of so many bytes at least, for all of which there is room."""
        if count * size > len(self.data) - self.at:
            raise ValueError(f"it claims {count} entries, for which it has no room")
        return count

    def text(self) -> str:
        """A length, and UTF-8."""
        (size,) = self.take("<Q")
        start = self.skip(size)
        return self.data[start : self.at].decode()

    def fact(self) -> None:
        """A key, and its value."""
        key = self.text()
        (kind,) = self.take("<I")
        start = self.at
        self.value(kind)
        if key.endswith(LAYERS) and kind in SCALARS:
            (self.layers,) = struct.unpack_from("<" + SCALARS[kind], self.data, start)

    def value(self, kind: int) -> None:
        """A number, a text, or an array of either."""
        if kind in SCALARS:
            self.skip(struct.calcsize(SCALARS[kind]))
        elif kind == TEXT:
            self.text()
        elif kind == ARRAY:
            inner, count = self.take("<IQ")
            if inner in SCALARS:
                self.skip(count * struct.calcsize(SCALARS[inner]))
            elif inner == TEXT:
                for _ in range(self.bounded(count, 8)):
                    self.text()
            else:
                raise ValueError(f"it has an array of type {inner}")
        else:
            raise ValueError(f"it has a value of type {kind}")

    def tensor(self) -> int:
        """A name, sizes, a type and an offset; where its data end, from the first tensor's on."""
        self.text()
        (axes,) = self.take("<I")
        if not 1 <= axes <= AXES:
            raise ValueError(f"it has a tensor of {axes} axes")
        sizes = self.take(f"<{axes}Q")
        kind, offset = self.take("<IQ")
        entries, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return offset + math.prod(sizes) // entries * size


def check_header(path: Path) -> None:
    """See that a file holds what its header claims.

    Raises:
        OSError: it cannot be read.
        ValueError: it does not.
    """
    check_file(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        Header(data)
