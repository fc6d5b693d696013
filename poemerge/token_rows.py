"""An expert's token rows in the order of the base's: matched by token, refused, or left alone.

An embedding and an output head have one row a token. Fine-tuning may add tokens, and another
tokenizer may number them otherwise; then row 17 is not the same token on both sides, and the
difference of the two matrices is no task vector.
"""

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError
from poemerge.tensor_files import TensorFiles
from poemerge.vocabulary import Vocabulary, read_vocabulary, same_vocabulary

REFUSE, PAD, BASE = "refuse", "pad", "base"
VOCABULARIES = (REFUSE, PAD, BASE)
LIST = "pad (rows go by their tokens, added tokens are kept) or base (the base's rows are kept)"


class Added(NamedTuple):
    """A token that an expert has and the base lacks."""

    row: int  # of the expert
    entry: Mapping[str, Any]  # what the expert's tokenizer.json says of it


@dataclass(frozen=True)
class TokenRows:
    """How the rows of an expert's embedding and head lie to those of the base.

    Attributes:
        kept: False if the expert has no say in them.
        order: matrix → the expert's row for each of the base's, -1 where it has none; empty if
            they are in the base's order.
        added: tokens that are added to the merge, by what they are.
        note: a sentence on what was done about a difference; empty if there is none.
    """

    kept: bool = True
    order: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, Added] = field(default_factory=dict)
    note: str = ""


def match_rows(
    expert: str, folder: Path, rows: Mapping[str, int], base: Checkpoint, policy: str
) -> TokenRows:
    """Compare an expert's vocabulary with the base's, and do about it what the policy says.

    Args:
        expert: its name.
        folder: of the expert.
        rows: name of a vocabulary matrix of the base → rows that the expert has for it.
        base: the base.
        policy: `refuse`, `pad` or `base`.

    Raises:
        CheckpointError: they differ, and the policy refuses that or cannot be followed.
    """
    resized = [name for name, count in rows.items() if count != base.tensors[name].shape[0]]
    if not resized and same_vocabulary(folder, base.folder):
        return TokenRows()
    own, ours = read_vocabulary(folder), read_vocabulary(base.folder)
    both = _Both(f"Expert {expert!r} ({folder})", rows, base, own, ours)
    if resized:
        return both.settle(both.resized(resized[0]), policy)
    if moved := ours.moved(own) if own and ours else []:
        return both.settle(both.moved(moved), policy)
    if both.added and policy == PAD:
        return TokenRows(added=both.entries())
    return TokenRows(note=both.left_out())


def gather(files: TensorFiles, name: str, wanted: Tensor) -> Tensor:
    """Rows of a tensor in any order, as they are stored; neighbours are read at once.

    Args:
        files: hold the tensor.
        name: of the tensor.
        wanted: row numbers (N,).
    """
    if not len(wanted):
        info = files.tensors[name]
        return torch.empty(0, *info.shape[1:], dtype=info.dtype)
    breaks = (wanted.diff() != 1).nonzero().flatten() + 1
    runs = wanted.tensor_split(breaks.cpu())
    return torch.cat([files.read(name, (int(run[0]), int(run[-1]) + 1)) for run in runs])


@dataclass(frozen=True)
class _Both:
    """An expert's vocabulary beside the base's; None where a folder has none."""

    where: str
    rows: Mapping[str, int]
    base: Checkpoint
    own: Vocabulary | None
    ours: Vocabulary | None

    def settle(self, why: str, policy: str) -> TokenRows:
        """Follow the policy where rows do not fit."""
        if policy == BASE:
            return TokenRows(kept=False, note=f"{why}; the base's rows are kept.")
        if policy == REFUSE:
            raise CheckpointError(f"{why}; choose vocabulary {LIST}.")
        if self.own is None or self.ours is None:
            lacking = "the base" if self.ours is None else "it"
            raise CheckpointError(
                f"{why}, and {lacking} has no tokenizer.json to match rows by token; add it, or "
                "choose vocabulary base."
            )
        if not self.rows:
            raise CheckpointError(
                f"{why}, and it has no embedding of its own to match by token; train it with the "
                "base's tokenizer, or choose vocabulary base."
            )
        note = f"{why}; rows were matched by token."
        return TokenRows(order=self.order(), added=self.entries(), note=note)

    def order(self) -> dict[str, Tensor]:
        """By token; a row without one stays where it is."""
        assert self.own is not None
        taken = set(self.own.rows.values())
        found = {}
        for name, count in self.rows.items():
            size = self.base.tensors[name].shape[0]
            order = [row if row < count and row not in taken else -1 for row in range(size)]
            for row, there in self._pairs():
                if row < size:
                    order[row] = there if there < count else -1
            found[name] = torch.tensor(order)
        return found

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """(the base's row, the expert's) of the base's tokens; -1 where the expert has none."""
        assert self.own is not None
        assert self.ours is not None
        yield from ((row, self.own.rows.get(token, -1)) for token, row in self.ours.rows.items())

    @cached_property
    def added(self) -> Mapping[str, int]:
        """Token → the expert's row, of those that the base lacks, by their rows."""
        if self.own is None or self.ours is None or not self.rows:
            return {}
        known, least = self.ours.rows, min(self.rows.values())
        found = {t: row for t, row in self.own.rows.items() if t not in known and row < least}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def entries(self) -> dict[str, Added]:
        """Those with what the expert's tokenizer says of them."""
        described = self.own.added if self.own else {}
        for token in self.added:
            if token not in described:
                raise CheckpointError(
                    f"{self.where} has the token {token!r}, which the base lacks, in the trained "
                    "part of its tokenizer; only tokens that were added afterwards can be taken "
                    "over, so choose vocabulary base."
                )
        return {token: Added(row, described[token]) for token, row in self.added.items()}

    def resized(self, name: str) -> str:
        """How many rows here and there."""
        return (
            f"{self.where} has {self.rows[name]} rows of tokens in {name} where the base has "
            f"{self.base.tensors[name].shape[0]}"
        )

    def moved(self, tokens: list[str]) -> str:
        """Which token has which row here and there."""
        assert self.own is not None
        assert self.ours is not None
        first = tokens[0]
        return (
            f"{self.where} numbers its tokens otherwise than the base: {first!r}"
            f"{_others(tokens)} is row {self.own.rows[first]} there and {self.ours.rows[first]} in "
            "the base"
        )

    def left_out(self) -> str:
        """What is lost with the base's tokenizer; empty if nothing is."""
        if not self.added:
            return ""
        return (
            f"{self.where} has the token {next(iter(self.added))!r}{_others(self.added)}, which "
            "the base's tokenizer and so the merge lack; choose vocabulary pad to keep it."
        )


def _others(tokens: Sized) -> str:
    return f" (and {len(tokens) - 1} more)" if len(tokens) > 1 else ""
