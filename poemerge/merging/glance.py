"""A look at values before a merge: a few rows of every tensor, or all, and what they say."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from poemerge.checkpoint import Checkpoint
from poemerge.device import STORED
from poemerge.experts import Expert
from poemerge.experts.values import check_finite
from poemerge.merging.terms import Terms
from poemerge.rules import is_tied_head, is_vocabulary
from poemerge.tensor_files import Rows, TensorInfo

VALUES = 4096  # of a tensor that are looked at, in whole rows
LEAST_ROWS = 8  # of a matrix, however long they are
READS = 2048  # in all; of more tensors than that allows, some are passed over
SLICE = 1 << 22  # values that are read at a time where all are
APART = 0.5  # of the base's own numbers left; a fine-tune keeps nearly all, another model none
SURE = 4  # standard deviations by which what is left must be below that: few numbers say little
HALF = 0.5
ALIKE = 0.7  # cosine of two rows that are one row, fine-tuned ...
AHEAD = 0.2  # ... and by how much it is above that of the rows with the same number


@dataclass
class Overlap:
    """How much of the base is left in an expert's matrices, rows centred.

    Attributes:
        base: ||W₀||².
        kept: <W, W₀>: equal to `base` for an update of any size that knows nothing of the base, 0
            for a model that knows nothing of it.
        moved: ||A||².
        count: of numbers.
    """

    base: float = 0.0
    kept: float = 0.0
    moved: float = 0.0
    count: int = 0

    def add(self, base: float, kept: float, moved: float, count: int) -> None:
        """Take in more of them."""
        self.base += base
        self.kept += kept
        self.moved += moved
        self.count += count

    @property
    def share(self) -> float:
        """Part of the base that is left."""
        return max(0.0, self.kept / self.base)

    @property
    def is_apart(self) -> bool:
        """True if nothing of the base is left, as far as so many numbers can say."""
        if not self.base:
            return False
        deviation = math.sqrt(self.moved * self.base / self.count)
        return self.kept + SURE * deviation < APART * self.base


@dataclass
class Impression:
    """What was seen of one expert.

    Attributes:
        values: how many were looked at.
        complete: True if these are all that it has.
        square: ||A||² of them.
        overlap: with the base, of matrices that it holds whole.
        rounding: ||error||² of the base's values if they were stored as the expert's are.
        lost: ||error||² of the expert's values if they are stored as the merge will be.
        apart: matrices of which nothing of the base is left.
        shuffled: those of them whose rows are other rows of the base.
        integers: tensors of integers that differ from the base's.
        dtypes: in which it holds tensors whole.
    """

    expert: Expert
    values: int = 0
    complete: bool = True
    square: float = 0.0
    overlap: Overlap = field(default_factory=Overlap)
    rounding: float = 0.0
    lost: float = 0.0
    apart: list[str] = field(default_factory=list)
    shuffled: list[str] = field(default_factory=list)
    integers: list[str] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    _seen: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        """Of all its updates that were looked at."""
        return self._seen.hexdigest()

    def see(self, info: TensorInfo, base: Tensor, delta: Tensor, stored: torch.dtype) -> None:
        """Note some rows of a tensor.

        Args:
            info: of the tensor.
            base: W₀ there, fp32.
            delta: A there, fp32.
            stored: dtype of the merge.
        """
        self.values += delta.numel()
        self.square += float(delta.square().sum(dtype=torch.float64))
        self._seen.update(info.name.encode())
        self._seen.update(delta.numpy().tobytes())
        self.lost += _rounding(base + delta, stored)
        if self.expert.rank(info) is None:
            self.dtypes.add(self.expert.stored(info))
            self.rounding += _rounding(base, self.expert.stored(info))


def look(base: Checkpoint, experts: Sequence[Expert], terms: Terms) -> list[Impression]:
    """Look at the experts beside their base.

    Args:
        base: of the experts.
        experts: opened.
        terms: how closely, and what the merge is stored as.

    Raises:
        CheckpointError: a value is not finite; the message names its tensor.
    """
    found = [Impression(expert) for expert in experts]
    infos = [info for info in base.tensors.values() if 0 not in info.shape]
    step = 1 if terms.deep else max(1, len(infos) * (1 + len(experts)) // READS)
    for info in infos[::step]:
        if not info.is_float:
            _compare(info, base, found, deep=terms.deep)
        elif not is_tied_head(info, base):
            _look(info, base, found, terms)
    for impression in found:
        impression.complete &= step == 1
    return found


def _look(info: TensorInfo, base: Checkpoint, found: list[Impression], terms: Terms) -> None:
    """One tensor of floats, in all experts that change it."""
    changing = [seen for seen in found if seen.expert.votes(info) and seen.expert.rank(info) != 0]
    if not changing:
        return
    overlaps = [Overlap() for _ in changing]
    for rows in _cuts(info, deep=terms.deep):
        start = base.read(info.name, rows).float()
        check_finite(start, info.name, f"the base ({base.folder})")
        middle = _centred(start)
        own = float(middle.square().sum())
        for seen, overlap in zip(changing, overlaps, strict=True):
            delta = torch.empty_like(start)
            seen.expert.fill(info, start, delta, rows)
            where = f"expert {seen.expert.name!r} ({seen.expert.folder})"
            check_finite(delta, info.name, where)
            seen.see(info, start, delta, STORED.get(terms.dtype, info.dtype))
            seen.complete &= terms.deep or delta.numel() == info.size
            away = _centred(delta)
            kept, moved = own + float((middle * away).sum()), float(away.square().sum())
            overlap.add(own, kept, moved, middle.numel())
    for seen, overlap in zip(changing, overlaps, strict=True):
        if seen.expert.rank(info) is None:
            _judge(info, base, seen, overlap)


def _judge(info: TensorInfo, base: Checkpoint, seen: Impression, overlap: Overlap) -> None:
    """How much of the base is left in a matrix; rows in another order look like none."""
    seen.overlap.add(overlap.base, overlap.kept, overlap.moved, overlap.count)
    if overlap.is_apart:
        seen.apart.append(info.name)
        if is_vocabulary(info, base) and _is_shuffled(info, base, seen.expert):
            seen.shuffled.append(info.name)


def _is_shuffled(info: TensorInfo, base: Checkpoint, expert: Expert) -> bool:
    """True if most of the expert's rows that were looked at are other rows of the base."""
    first, end = next(_cuts(info, deep=False)) or (0, 0)
    weight = expert.weight(info, (first, end))
    if weight is None:
        return False
    own = normalize(weight.float())
    best = torch.zeros(len(own))
    for cut in _cuts(info, deep=True):
        there = normalize(base.read(info.name, cut).float())
        best = torch.maximum(best, (own @ there.mT).amax(dim=1))
    same = (own * normalize(base.read(info.name, (first, end)).float())).sum(dim=1)
    elsewhere = (best > ALIKE) & (best > same + AHEAD)
    return bool(elsewhere.float().mean() > HALF)


def _compare(info: TensorInfo, base: Checkpoint, found: list[Impression], *, deep: bool) -> None:
    """One tensor of integers."""
    voters = [seen for seen in found if seen.expert.votes(info)]
    for rows in _cuts(info, deep=deep):
        start = base.read(info.name, rows)
        for seen in voters:
            own = seen.expert.weight(info, rows)
            known = own is None or torch.equal(own.to(start.dtype), start)
            if not known and info.name not in seen.integers:
                seen.integers.append(info.name)


def _cuts(info: TensorInfo, *, deep: bool) -> Iterator[Rows | None]:
    """All rows in slices, or some from the middle; None for a number without an axis."""
    if not info.shape:
        yield None
        return
    rows, width = info.shape[0], info.size // info.shape[0]
    if deep:
        step = max(1, SLICE // width)
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
        return
    count = min(rows, max(LEAST_ROWS, VALUES // width))
    start = (rows - count) // 2
    yield start, start + count


def _centred(rows: Tensor) -> Tensor:
    """Without the mean row, which unrelated models may share; zero for what is no matrix."""
    if rows.dim() < 2:
        return torch.zeros(())
    return rows - rows.mean(dim=0)


def _rounding(values: Tensor, dtype: torch.dtype) -> float:
    return float((values.to(dtype).float() - values).square().sum(dtype=torch.float64))
