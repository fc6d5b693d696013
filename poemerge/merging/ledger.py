"""What was done to every tensor, gathered batch by batch; slices of a tensor add up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from poemerge.merging.groups import Batch, Group
from poemerge.report import TensorReport


@dataclass
class Ledger:
    """Reports of tensors.

    Attributes:
        experts: names, in order.
        dtype_of: stored dtype of a base dtype.
        tensors: those done.
    """

    experts: Sequence[str]
    dtype_of: Any
    tensors: list[TensorReport] = field(default_factory=list)
    _partial: list[float] = field(default_factory=list)

    def add(
        self,
        batch: Batch,
        squares: torch.Tensor,
        certificates: Sequence[Mapping[str, Any]] = (),
        truncation: Sequence[float] = (),
    ) -> None:
        """Note a batch.

        Args:
            batch: what was merged.
            squares: ||A_i||² of the voters and ||M||² last, (B, E + 1).
            certificates: of the solve, one a tensor, if there was one.
            truncation: relative error of a truncated rank, one a tensor, if there was one.
        """
        rows = squares.tolist()
        if batch.rows is not None:
            rows = [self._add_up(rows[0], start=batch.is_first)]
        if not batch.is_last:
            return
        for index, (info, row) in enumerate(zip(batch.tensors, rows, strict=True)):
            self.note(
                batch.group,
                info.name,
                info.dtype,
                norms=tuple(square**0.5 for square in row),
                certificate=certificates[index] if certificates else {},
                truncation=truncation[index] if truncation else 0.0,
            )

    @property
    def changed(self) -> set[str]:
        """Experts that change a tensor."""
        return {
            name
            for tensor in self.tensors
            for name, norm in zip(tensor.experts, tensor.norms, strict=False)
            if norm
        }

    def note(self, group: Group, name: str, dtype: torch.dtype, **found: Any) -> None:
        """Note one tensor."""
        voters = tuple(self.experts[i] for i in group.voters)
        stored = str(self.dtype_of(dtype)).removeprefix("torch.")
        self.tensors.append(
            TensorReport(name, group.rule, group.shape, stored, experts=voters, **found)
        )

    def _add_up(self, row: list[float], *, start: bool) -> list[float]:
        before = [0.0] * len(row) if start else self._partial
        self._partial = [a + b for a, b in zip(before, row, strict=True)]
        return self._partial
