"""Safetensors files whose headers lie."""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.reliability.corpus import trees
from tests.reliability.corpus.damage import spoil

Header = dict[str, Any]
LENGTHS = (0, 1, 7, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1, 100_000_000)
HUGE = (-1, 0, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 1.5, None, "1", True, [])
DTYPES = ("F4", "F8_E4M3", "F8_E8M0", "I4", "C64", "U16", "U64", "f32", "", "F32 ", None, 3, [])
NAMES = (
    *("", "/", "../../evil", "/etc/passwd", "a\0b", "a\nb", "\x1b[31mred", "x" * 100_000),
    *("__metadata__", "a.weight.weight", ".", "..", " ", "模型.weight", "\u202eweight"),
)


def spoil_file(data: bytes, random: Random) -> bytes:
    """One safetensors file spoiled.

    Args:
        data: of a sound one.
        random: says where and how.
    """
    how = random.random()
    if how < 0.2:
        return spoil(data, random)
    if how < 0.3:
        return data[: _boundary(data, random)]
    if how < 0.4:
        return struct.pack("<Q", random.choice(LENGTHS)) + data[8:]
    header, body = read(data)
    if how < 0.6:
        return _with_text(trees.spoil_json(json.dumps(header), random), body)
    lied = random.choice(LIES)(header, random)
    return written(header, body if lied is None else lied + body)


def read(data: bytes) -> tuple[Header, bytes]:
    """Header and tensors of a sound file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def written(header: Header, body: bytes) -> bytes:
    """A file with this header, whatever it says."""
    return _with_text(json.dumps(header).encode("utf-8", "surrogatepass"), body)


def _with_text(text: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def _boundary(data: bytes, random: Random) -> int:
    """Where one thing ends and the next begins, or a byte beside that."""
    header, _ = read(data)
    start = 8 + int.from_bytes(data[:8], "little")
    ends = [start + at for entry in _entries(header) for at in entry["data_offsets"]]
    return max(0, random.choice([0, 4, 8, start, *ends]) + random.choice([-1, 0, 1]))


def _entries(header: Header) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _one(header: Header, random: Random) -> dict[str, Any]:
    return random.choice(_entries(header))


def huge_shape(header: Header, random: Random) -> None:
    """A size that is negative, too large, or no number."""
    shape = _one(header, random)["shape"]
    shape[random.randrange(len(shape))] = random.choice(HUGE)


def overflow(header: Header, random: Random) -> None:
    """A product of sizes that is 0 or the right one once it has run over."""
    entry = _one(header, random)
    entry["shape"] = random.choice(
        [[2**32, 2**32], [2**63, 2], [0, 2**63], [2**62, 0], [2**64 - 1, 2**64 - 1], [2**33] * 4]
    )


def many_axes(header: Header, random: Random) -> None:
    """The same number of entries along more axes than anybody has."""
    _one(header, random)["shape"] += [1] * random.choice([1, 20, 64, 65, 1000, 100_000])


def no_axes(header: Header, random: Random) -> None:
    """A shape that is gone, or is no list."""
    _one(header, random)["shape"] = random.choice([[], None, {}, "32", 32])


def offsets(header: Header, random: Random) -> None:
    """Beyond the end, before the beginning, the wrong way round."""
    entry = _one(header, random)
    start, end = entry["data_offsets"]
    entry["data_offsets"] = random.choice(
        [
            *([end, start], [start, end + 1], [start - 1, end], [start + 1, end], [0, end]),
            *([start, 2**63], [2**63, 2**64 - 1], [-8, end], [start], [start, end, end], None),
            *([float(start), float(end)], [start, str(end)], [0, 2**40]),
        ]
    )


def overlap(header: Header, random: Random) -> None:
    """Two tensors on the same bytes."""
    one, other = _one(header, random), _one(header, random)
    other |= {key: one[key] for key in ("shape", "data_offsets")}


def gap(header: Header, random: Random) -> bytes:
    """Bytes that belong to nobody, before all tensors."""
    size = random.choice([1, 8, 4096])
    for entry in _entries(header):
        entry["data_offsets"] = [at + size for at in entry["data_offsets"]]
    return random.randbytes(size)


def dtype(header: Header, random: Random) -> None:
    """One that nobody knows, or one of another size."""
    _one(header, random)["dtype"] = random.choice([*DTYPES, "F64", "F16", "I8", "BOOL", "I32"])


def name(header: Header, random: Random) -> None:
    """A tensor with a name that is a path, a terminal's command, or nothing."""
    old = random.choice([key for key in header if key != "__metadata__"])
    header[random.choice(NAMES)] = header.pop(old)


def lost(header: Header, random: Random) -> None:
    """A tensor whose entry is gone, though its bytes are there."""
    header.pop(random.choice([key for key in header if key != "__metadata__"]))


def metadata(header: Header, random: Random) -> None:
    """Remarks that are none."""
    header["__metadata__"] = random.choice(
        [None, [], "pt", {"format": 1}, {"format": None}, {"a": {}}, {"format": "tf"}, {}]
    )


def terabytes(header: Header, random: Random) -> None:
    """Every tensor claims as much as no disk holds."""
    for entry in _entries(header):
        entry["shape"], entry["data_offsets"] = [2**40], [0, 2**42]


LIES: tuple[Callable[[Header, Random], bytes | None], ...] = (
    huge_shape,
    overflow,
    many_axes,
    no_axes,
    offsets,
    overlap,
    gap,
    dtype,
    name,
    lost,
    metadata,
    terabytes,
)
