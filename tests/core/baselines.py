"""How the tests of Model Stock, KnOTS, TSV-M and Iso-C merge, and what counts as equal."""

import torch
from torch import Tensor

from tests.core.stacks import Pair, dense, merge, update

KEEP = 0.4
SAME = 1e-6  # of directions whose singular value is 1e-5 of the largest


def solve(experts: list[Pair], method: str, say: list[float] | None = None, twin=dense) -> Tensor:  # noqa: ANN001
    """The merged update of a stack of one matrix."""
    settings = {"keep": KEEP} if method == "knots_ties" else {}
    return update(merge(twin(experts), method, say, **settings))


def turn(size: int, seed: int) -> Tensor:
    """A seeded rotation in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
