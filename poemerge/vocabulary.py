"""A vocabulary on disk: which token has which row of the embedding."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from poemerge.atomic import write_json
from poemerge.checkpoint import read_json
from poemerge.errors import CheckpointError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
FILES = (TOKENIZER, "vocab.json", "vocab.txt")  # of which the first that is there counts
ADDED = "added_tokens.json"  # beside vocab.json


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        rows: token → row.
        added: those that were added to a trained tokenizer, as tokenizer.json describes them.
    """

    rows: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Rows that it needs."""
        return max(self.rows.values(), default=-1) + 1

    def moved(self, other: "Vocabulary") -> list[str]:
        """Tokens that another vocabulary has in another row, by their rows here."""
        found = [token for token, row in self.rows.items() if other.rows.get(token, row) != row]
        return sorted(found, key=lambda token: self.rows[token])


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a model folder; None where it has none that is plain text.

    Raises:
        CheckpointError: a file is there and says nothing of tokens and rows.
    """
    file = _file(folder)
    if file is None:
        return None
    stat = file.stat()
    return _read(file, stat.st_mtime_ns, stat.st_size)


def same_vocabulary(one: Path, other: Path) -> bool:
    """True if two folders have the same bytes for one, or one of them has none."""
    left, right = _file(one), _file(other)
    return left is None or right is None or left.read_bytes() == right.read_bytes()


def add_tokens(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add tokens to the tokenizer in `folder`.

    Args:
        folder: holds tokenizer.json.
        entries: `id`, `content` and what else tokenizer.json says of an added token.
    """
    tokenizer = read_json(folder / TOKENIZER)
    known = [*tokenizer.get("added_tokens", ()), *entries]
    write_json(folder / TOKENIZER, tokenizer | {"added_tokens": known})
    config = read_json(folder / CONFIG)
    if "added_tokens_decoder" in config:  # a second list, which older tokenizers go by
        more = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
        decoder = config["added_tokens_decoder"] | more
        write_json(folder / CONFIG, config | {"added_tokens_decoder": decoder})


def _file(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


@lru_cache(maxsize=2)  # the base's is asked for once an expert
def _read(file: Path, _mtime_ns: int, _size: int) -> Vocabulary:
    try:
        if file.name == TOKENIZER:
            return _fast(read_json(file))
        if file.suffix == ".json":
            return Vocabulary(_numbers({**read_json(file), **read_json(file.with_name(ADDED))}))
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        return Vocabulary({token: row for row, token in enumerate(lines)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{file} is no vocabulary ({error!r}); fetch it again, or leave it out."
        raise CheckpointError(message) from error


def _fast(tokenizer: Mapping[str, Any]) -> Vocabulary:
    """That of tokenizer.json: a trained part, a table or a list of (token, score), and the rest."""
    trained = tokenizer["model"].get("vocab") or {}
    if not isinstance(trained, Mapping):
        trained = {token: row for row, (token, *_) in enumerate(trained)}
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or ()}
    rows = {**trained, **{token: entry["id"] for token, entry in added.items()}}
    return Vocabulary(_numbers(rows), added)


def _numbers(rows: Mapping[str, Any]) -> dict[str, int]:
    for token, row in rows.items():
        if not isinstance(row, int) or row < 0:
            raise ValueError(f"{json.dumps(token)} has row {row!r}")
    return dict(rows)
