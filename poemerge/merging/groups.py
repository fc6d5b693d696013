"""Tensors that are merged together, and the batches that they are cut into."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from poemerge.method import Cut, Matrix
from poemerge.rules import AVERAGE, COPY, FORMULA
from poemerge.tensor_files import Rows, TensorInfo


@dataclass(frozen=True)
class Group:
    """Tensors of one shape that get one rule from the same experts."""

    rule: str
    shape: tuple[int, ...]
    voters: tuple[int, ...]  # indices of experts
    ranks: tuple[int | None, ...]  # per voter; None is dense
    tensors: tuple[TensorInfo, ...]  # all in one file
    cut: Cut | None = None
    curvature: int = 0  # entries of a voter's curvature
    streamed: bool = False  # True if the experts come one by one, since they do not fit together

    @property
    def file(self) -> str:
        """The base's shard that holds these tensors, and the output's that will."""
        return self.tensors[0].file

    @property
    def size(self) -> int:
        """Entries of one tensor."""
        return math.prod(self.shape)

    @property
    def in_factors(self) -> bool:
        """True if every voter's update is kept in factors, all the way."""
        return bool(self.ranks) and all(rank is not None for rank in self.ranks)

    @property
    def joint_rank(self) -> int:
        """Σ R_i of updates in factors."""
        return sum(rank or 0 for rank in self.ranks)

    @property
    def matrix(self) -> Matrix:
        """One of the group, where its tensors are matrices."""
        rank = self.joint_rank if self.in_factors else None
        return Matrix(self.shape[0], self.shape[1], len(self.voters), rank)

    @property
    def update_bytes(self) -> int:
        """Size of the voters' updates of one tensor, in fp32."""
        if self.in_factors:
            return 4 * sum(self.shape) * self.joint_rank
        return 4 * self.size * len(self.voters)

    @property
    def loaded_bytes(self) -> int:
        """Size in memory of one tensor, its updates and their curvature, in fp32."""
        return 4 * (self.size + self.curvature * len(self.voters)) + self.update_bytes

    def batches(self, limit: int, *, local: bool) -> Iterator["Batch"]:
        """Cut into batches of about `limit` loaded bytes.

        Args:
            limit: bytes.
            local: True if the method merges rows apart; a large tensor then comes in slices.
        """
        sliced = self.rule == COPY or (local and self.rule in {AVERAGE, FORMULA})
        if sliced and self.shape and self.loaded_bytes > limit:
            rows = self.shape[0]
            step = max(1, limit * rows // self.loaded_bytes)
            for info in self.tensors:
                for start in range(0, rows, step):
                    yield Batch(self, (info,), (start, min(start + step, rows)))
            return
        count = 1 if self.streamed else max(1, limit // max(1, self.loaded_bytes))
        for start in range(0, len(self.tensors), count):
            yield Batch(self, self.tensors[start : start + count])


@dataclass(frozen=True)
class Batch:
    """Tensors, or some rows of one, that are read, merged and written at once."""

    group: Group
    tensors: tuple[TensorInfo, ...]
    rows: Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is read of each tensor."""
        if self.rows is None:
            return self.group.shape
        return (self.rows[1] - self.rows[0], *self.group.shape[1:])

    @property
    def is_first(self) -> bool:
        """True if no rows of its tensors came before."""
        return self.rows is None or self.rows[0] == 0

    @property
    def is_last(self) -> bool:
        """True if no rows of its tensors will follow."""
        return self.rows is None or self.rows[1] == self.group.shape[0]

    @property
    def as_group(self) -> Group:
        """What a group of this batch alone would be."""
        return replace(self.group, shape=self.shape, tensors=self.tensors)
