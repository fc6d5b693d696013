"""Tokens that a merge has beyond its base's.

A task vector is a difference to a row of the base, which these tokens lack. So their rows are not
merged: they are taken over from the expert that added them, or averaged over those that did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.atomic import write_json
from poemerge.checkpoint import Checkpoint, read_json
from poemerge.errors import CheckpointError
from poemerge.experts import Expert
from poemerge.experts.values import check_finite
from poemerge.rules import is_tied_head, is_vocabulary
from poemerge.settings import Settings
from poemerge.tensor_files import TensorInfo
from poemerge.vocabulary import TOKENIZER, Vocabulary, add_tokens, read_vocabulary


@dataclass(frozen=True)
class NewToken:
    """One token: what tokenizer.json says of it, and its row in each expert that has it."""

    entry: Mapping[str, Any]
    rows: Mapping[int, int]  # index of the expert → row


@dataclass(frozen=True)
class Growth:
    """New tokens in the order of their rows, which follow those of the base's tokenizer.

    Attributes:
        tokens: one at least.
        first: row of the first.
        tensors: that have token rows.
    """

    tokens: tuple[NewToken, ...]
    first: int
    tensors: frozenset[str]

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Shape of a tensor of the merge."""
        if info.name not in self.tensors:
            return info.shape
        return (max(info.shape[0], self.first + len(self.tokens)), *info.shape[1:])

    def rows(self, info: TensorInfo, experts: Sequence[Expert], settings: Settings) -> Tensor:
        """The new tokens' rows of a matrix (N, I), fp32: means by the experts' say."""
        return torch.cat([_row(info, token, experts, settings) for token in self.tokens])

    def write_side_files(self, folder: Path) -> None:
        """Add the tokens to the tokenizer in `folder`, and state the new size in its config."""
        entries = [
            {**token.entry, "id": self.first + index} for index, token in enumerate(self.tokens)
        ]
        add_tokens(folder, entries)
        config = read_json(folder / "config.json")
        part = config.get("text_config", config)
        if "vocab_size" in part:
            size = max(part["vocab_size"], self.first + len(self.tokens))
            part = part | {"vocab_size": size}
            whole = config | {"text_config": part} if "text_config" in config else part
            write_json(folder / "config.json", whole)


def plan_growth(base: Checkpoint, experts: Sequence[Expert]) -> Growth | None:
    """The tokens that experts add, in the order of experts and of their rows.

    Raises:
        CheckpointError: the base or an expert has no place for one of them.
    """
    found: dict[str, NewToken] = {}
    for index, expert in enumerate(experts):
        for token, added in expert.tokens.added.items():
            known = found.get(token, NewToken(added.entry, {}))
            found[token] = NewToken(known.entry, {**known.rows, index: added.row})
    if not found:
        return None
    tables = [info for info in base.tensors.values() if _has_token_rows(info, base)]
    ours = read_vocabulary(base.folder)
    assert ours is not None
    _check_room(base, ours, tables)
    for info in tables:
        for token, new in found.items():
            _check_row(info, token, [experts[index] for index in new.rows])
    return Growth(tuple(found.values()), ours.size, frozenset(info.name for info in tables))


def _has_token_rows(info: TensorInfo, base: Checkpoint) -> bool:
    return is_vocabulary(info, base) and not is_tied_head(info, base)


def _check_room(base: Checkpoint, ours: Vocabulary, tables: Sequence[TensorInfo]) -> None:
    if not (base.folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"{base.folder} has no {TOKENIZER} that tokens could be added to; save its tokenizer "
            "in this form, or choose vocabulary base."
        )
    per_token = [i.name for i in base.tensors.values() if i.shape == (base.vocabulary,)]
    short = [info.name for info in tables if info.shape[0] < ours.size]
    if per_token or short:
        raise CheckpointError(
            f"{(per_token or short)[0]} of the base ({base.folder}) cannot be given rows for added "
            "tokens; choose vocabulary base."
        )


def _check_row(info: TensorInfo, token: str, holders: Sequence[Expert]) -> None:
    if not any(_holds(expert, info) for expert in holders):
        raise CheckpointError(
            f"Expert {holders[0].name!r} ({holders[0].folder}) adds the token {token!r}, but has "
            f"no row for it in {info.name}; choose vocabulary base."
        )


def _holds(expert: Expert, info: TensorInfo) -> bool:
    return expert.votes(info) and expert.rank(info) is None


def _row(
    info: TensorInfo, token: NewToken, experts: Sequence[Expert], settings: Settings
) -> Tensor:
    """Mean of the experts' rows (1, I), by their say; of all alike where none of them has one."""
    total, say = torch.zeros(1, *info.shape[1:]), 0.0
    holders = [index for index in token.rows if _holds(experts[index], info)]
    says = [settings.weight_of(experts[index].name, info.name) for index in holders]
    for index, weight in zip(holders, says if any(says) else [1.0] * len(says), strict=True):
        row = token.rows[index]
        own = experts[index].weight(info, (row, row + 1))
        assert own is not None
        check_finite(own.float(), info.name, f"expert {experts[index].name!r}")
        total += weight * own.float()
        say += weight
    return total / say
