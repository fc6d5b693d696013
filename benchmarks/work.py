"""What a computation does, counted while it runs, whatever it is made of."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass
class Work:
    """Arithmetic of products and factorisations, and memory traffic without any fusion.

    Attributes:
        flops: floating-point operations by dtype; a multiply-add is two.
        bytes: what the operations read and write, each tensor counted whole.
    """

    flops: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.flops - other.flops, self.bytes - other.bytes)

    def __mul__(self, times: float) -> "Work":
        flops = Counter({dtype: round(times * flops) for dtype, flops in self.flops.items()})
        return Work(flops, round(times * self.bytes))


def count(run: Callable[[], object]) -> Work:
    """Run once and count."""
    counter = _Counter()
    with counter:
        run()
    return counter.work


def _cholesky(matrix: Tensor, *_: Any) -> float:
    return prod(matrix.shape[:-2]) * matrix.shape[-1] ** 3 / 3


def _cholesky_solve(right: Tensor, factor: Tensor, *_: Any) -> float:
    return 2.0 * factor.shape[-1] * right.numel()


def _triangular(factor: Tensor, right: Tensor, *_: Any) -> float:
    return 1.0 * factor.shape[-1] * right.numel()


def _qr(matrix: Tensor, *_: Any) -> float:
    """Both factors, thin."""
    long, short = max(matrix.shape[-2:]), min(matrix.shape[-2:])
    return prod(matrix.shape[:-2]) * (4.0 * long * short**2 - 4.0 * short**3 / 3)


def _symmetric_eigen(matrix: Tensor, *_: Any) -> float:
    """With vectors; the textbook figure for the divide-and-conquer driver."""
    return 9.0 * prod(matrix.shape[:-2]) * matrix.shape[-1] ** 3


FACTORISATIONS: dict[Any, Callable[..., float]] = {
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_solve: _cholesky_solve,
    aten.linalg_solve_triangular: _triangular,
    aten.linalg_qr: _qr,
    aten._linalg_eigh: _symmetric_eigen,  # noqa: SLF001
}


class _Counter(TorchDispatchMode):
    """Sees every operation on its way to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        tensors = list(_tensors((args, kwargs, out)))
        self.work.bytes += sum(t.numel() * t.element_size() for t in tensors)
        packet = func.overloadpacket
        if packet in FACTORISATIONS:
            self._add(tensors[0], FACTORISATIONS[packet](*args))
        elif packet in flop_registry:
            self._add(tensors[0], flop_registry[packet](*args, **kwargs, out_val=out))
        return out

    def _add(self, like: Tensor, flops: float) -> None:
        self.work.flops[str(like.dtype).removeprefix("torch.")] += int(flops)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            yield from _tensors(leaf)
