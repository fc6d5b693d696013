"""Bytes spoiled at random."""

from collections.abc import Callable
from random import Random

Damage = Callable[[bytes, Random], bytes]


def spoil(data: bytes, random: Random) -> bytes:
    """One of the damages below."""
    return random.choice(DAMAGES)(data, random)


def cut(data: bytes, random: Random) -> bytes:
    """The rest is missing."""
    return data[: random.randrange(len(data))]


def behead(data: bytes, random: Random) -> bytes:
    """The beginning is missing."""
    return data[random.randrange(1, len(data)) :]


def flip(data: bytes, random: Random) -> bytes:
    """Some bits are others, most likely near the beginning, where headers are."""
    spoiled = bytearray(data)
    for _ in range(random.randint(1, 8)):
        end = random.choice([16, 256, len(data)])
        spoiled[random.randrange(min(end, len(data)))] ^= 1 << random.randrange(8)
    return bytes(spoiled)


def blot(data: bytes, random: Random) -> bytes:
    """A stretch is one byte over and over: NUL, 0xff (no UTF-8), a bracket, a quote, a blank."""
    start, size = random.randrange(len(data)), random.choice([1, 8, 4096])
    stain = random.choice([b"\0", b"\xff", b"[", b'"', b" "])
    return data[:start] + stain * min(size, len(data) - start) + data[start + size :]


def insert(data: bytes, random: Random) -> bytes:
    """Something stands between."""
    start = random.randrange(len(data))
    return data[:start] + random.randbytes(random.choice([1, 8, 1024])) + data[start:]


def double(data: bytes, random: Random) -> bytes:
    """A stretch stands there twice."""
    start = random.randrange(len(data))
    end = random.randrange(start, len(data))
    return data[:end] + data[start:]


def mark(data: bytes, random: Random) -> bytes:
    """A byte order mark is put in front."""
    return b"\xef\xbb\xbf" + data


def widen(data: bytes, random: Random) -> bytes:
    """Text in UTF-16, as some editors save it."""
    return data.decode("latin-1").encode(random.choice(["utf-16", "utf-16-be"]))


def empty(data: bytes, random: Random) -> bytes:
    """Nothing is left."""
    return b""


def noise(data: bytes, random: Random) -> bytes:
    """Nothing is right."""
    return random.randbytes(min(len(data), 4096))


DAMAGES: tuple[Damage, ...] = (
    cut,
    cut,
    behead,
    flip,
    flip,
    blot,
    insert,
    double,
    mark,
    widen,
    empty,
    noise,
)
