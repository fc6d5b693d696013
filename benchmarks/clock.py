"""Wall time on a device, and what that device can do at most, measured in the same run."""

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.work import Work

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices of the matmul rate
COPY = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes copied for the bandwidth
PROBES = 5


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device."""

    float32: float  # FLOP/s of a square matmul, TF32 off
    float64: float  # FLOP/s of a square matmul
    bandwidth: float  # bytes/s read and written by a copy

    @classmethod
    def of(cls, device: torch.device) -> "Ceilings":
        """Measure them now."""
        source = torch.ones(COPY[device.type] // 4, device=device)
        target = torch.empty_like(source)
        copied = _fastest(lambda: target.copy_(source), device)
        rates = (_matmul_rate(dtype, device) for dtype in (torch.float32, torch.float64))
        return cls(*rates, 2 * COPY[device.type] / copied)

    def at_best(self, other: "Ceilings") -> "Ceilings":
        """The better of two measurements, rate by rate: a busy machine hides what it can do."""
        return Ceilings(*map(max, astuple(self), astuple(other)))

    def shares(self, work: Work, seconds: float) -> tuple[float, float]:
        """How much of the matmul rates and of the bandwidth `work` in `seconds` amounts to."""
        arithmetic = sum(flops / getattr(self, dtype) for dtype, flops in work.flops.items())
        return arithmetic / seconds, work.bytes / self.bandwidth / seconds


def full_precision() -> None:
    """No TF32: fp32 means fp32 on both sides."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def name_of(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Timed:
    """A run: how long it took, and what it returned."""

    seconds: float
    result: Any


def timed(run: Callable[[], Any], device: torch.device) -> Timed:
    """Run once, with the device idle before and after."""
    _wait(device)
    start = time.perf_counter()
    result = run()
    _wait(device)
    return Timed(time.perf_counter() - start, result)


def race(
    sides: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, budget: float
) -> dict[str, Timed]:
    """Median seconds of each side; they take turns, so that a busy machine meets all of them.

    Args:
        sides: name → what to run, already warm.
        device: where it runs.
        repeats: runs of each side at most.
        budget: seconds after which a side is not run again.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in sides.items():
            if sum(taken[name]) <= budget:
                last = timed(run, device)
                taken[name].append(last.seconds)
                results[name] = last.result
    return {name: Timed(median(taken[name]), results[name]) for name in sides}


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Best of a few runs: a ceiling is what the device can do, not its mood."""
    return min(timed(run, device).seconds for _ in range(PROBES))


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    side = SIDE[device.type]
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    return 2.0 * side**3 / _fastest(lambda: matrix @ matrix, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
