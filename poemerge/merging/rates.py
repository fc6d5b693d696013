"""How fast a machine does what a merge takes: given by whoever plans, or measured here."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from poemerge.merging.cost import Cost

PROBE = 1024  # side of the matrix product that measures arithmetic
PROBE_BYTES = 64 << 20  # more than caches hold
PROBE_SECONDS = 0.5  # for each rate
EACH = 3.5e-4  # seconds a tensor, beside what its size takes; measured on CPUs


@dataclass(frozen=True)
class Rates:
    """Of one worker.

    Attributes:
        bandwidth: bytes a second, read from or written to where the checkpoints lie.
        hashing: bytes a second through sha256; every byte read or written is hashed once.
        single: floating-point operations a second, of a matrix product in fp32.
        double: in fp64.
        memory: bytes a second through its memory.
    """

    bandwidth: float
    hashing: float
    single: float
    double: float
    memory: float

    def seconds(self, cost: Cost) -> Mapping[str, float]:
        """What a cost takes, part by part; one after the other, as if nothing overlapped."""
        return {
            "reading": cost.read / self.bandwidth,
            "writing": cost.written / self.bandwidth,
            "hashing": (cost.read + cost.written) / self.hashing,
            "fp32 arithmetic": cost.single / self.single,
            "fp64 arithmetic": cost.double / self.double,
            "memory traffic": cost.traffic / self.memory,
            "handling tensors": cost.tensors * EACH,
        }

    def total(self, cost: Cost) -> float:
        """Seconds of all parts."""
        return sum(self.seconds(cost).values())

    def sharing(self, storage: float | None, workers: int) -> Self:
        """The same where so many workers share a storage of so many bytes a second."""
        if storage is None:
            return self
        return replace(self, bandwidth=min(self.bandwidth, storage / workers))

    @classmethod
    def measured(cls, device: torch.device) -> Self:
        """Of this machine, now."""
        return cls(
            bandwidth=_storage_rate(),
            hashing=_hash_rate(),
            single=_flop_rate(device, torch.float32),
            double=_flop_rate(device, torch.float64),
            memory=_pass_rate(device),
        )


# Of no machine in particular, and good enough to say which of two jobs is the longer one.
NOMINAL = Rates(bandwidth=1e9, hashing=1e9, single=1e11, double=5e10, memory=1e10)


def _flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.rand(PROBE, PROBE, dtype=dtype, device=device)
    return 2.0 * PROBE**3 / _seconds(lambda: float((matrix @ matrix)[0, 0]))


def _pass_rate(device: torch.device) -> float:
    """Between tensors that are there already: new ones would time the system's paging."""
    given = torch.ones(PROBE_BYTES // 4, device=device)
    made = torch.empty_like(given)
    return 2.0 * PROBE_BYTES / _seconds(lambda: float(torch.add(given, 1, out=made)[0]))


def _hash_rate() -> float:
    data = bytes(PROBE_BYTES)
    return PROBE_BYTES / _seconds(lambda: hashlib.sha256(data).digest())


def _storage_rate() -> float:
    """Of a file that was just written, so through the caches of the system."""
    data = bytes(PROBE_BYTES)

    def there_and_back() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            file.read()

    return 2.0 * PROBE_BYTES / _seconds(there_and_back)


def _seconds(probe: Callable[[], object]) -> float:
    """The mean of as many as fit, after one that warms up: a merge meets every mood, too."""
    probe()
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < PROBE_SECONDS:
        probe()
        count += 1
    return passed / count
