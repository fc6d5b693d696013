"""GGUF files whose headers lie."""

import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

import gguf
import numpy as np

from tests.reliability.corpus.bench import Kind
from tests.reliability.corpus.damage import spoil
from tests.reliability.corpus.sound import tensors

NUMBERS = (0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
LONG = (2**32, 2**33, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e30)


def spoil_file(data: bytes, marks: list[tuple[int, int]], random: Random) -> bytes:
    """One file spoiled.

    Args:
        data: of a sound one.
        marks: of its header: where each part begins, and how long that is.
        random: says where and how.
    """
    start, size = random.choice(marks)
    how = random.random()
    if how < 0.2:
        return spoil(data, random)
    if how < 0.35:
        return data[: max(0, start + random.choice([-1, 0, 1]))]
    if how < 0.45:
        return data[:start] + random.randbytes(size) + data[start + size :]
    if how < 0.55:  # a part that is not there, or is there twice
        return (
            data[:start] + data[start : start + size] * random.choice([0, 2]) + data[start + size :]
        )
    if size not in {4, 8}:
        return data[:start] + bytes([random.choice([0, 255, 128])]) * size + data[start + size :]
    numbers = NUMBERS + LONG if size == 8 else NUMBERS
    lie = struct.pack("<Q" if size == 8 else "<I", random.choice(numbers))
    if random.random() < 0.1:
        lie = struct.pack("<d" if size == 8 else "<f", random.choice(FLOATS))
    return data[:start] + lie + data[start + size :]


def marks(path: Path) -> list[tuple[int, int]]:
    """Every part of a header, as the reader of the `gguf` package finds them in a sound file."""
    reader = gguf.GGUFReader(path)
    fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    return [(0, 4), *(mark for field in fields for mark in _parts(field))]


def _parts(field: gguf.ReaderField) -> Iterator[tuple[int, int]]:
    at = field.offset
    for part in field.parts[:12]:  # of an array of tokens, the first will do
        yield at, part.nbytes
        at += part.nbytes


def _spoil(folder: Path, random: Random) -> None:
    path = folder / "model.gguf"
    path.write_bytes(spoil_file(path.read_bytes(), marks(path), random))


def sound(folder: Path, way: str) -> None:
    """What was made has the numbers that the `gguf` package finds in the file, no more, no less."""
    out = folder / ("out" if way == "convert" else "base")
    made = [weight.double().numpy().ravel() for weight in tensors(out).values()]
    reader = gguf.GGUFReader(folder / "model.gguf")
    with np.errstate(all="ignore"):  # odd bits are odd numbers
        held = [gguf.dequantize(each.data, each.tensor_type).ravel() for each in reader.tensors]
    assert np.array_equal(
        np.sort(np.concatenate(made)), np.sort(np.concatenate(held)), equal_nan=True
    )


GGUFS = Kind("ggufs", ("convert",), {"model.gguf": ("tiny.gguf", "tiny-q8.gguf")}, _spoil, sound)
