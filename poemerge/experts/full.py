"""A full fine-tuned checkpoint as an expert."""

from pathlib import Path

import torch
from torch import Tensor

from poemerge.checkpoint import Checkpoint
from poemerge.experts.values import check_finite, subtract
from poemerge.fitting import (
    align,
    check_fit,
    heads_from_embedding,
    require_common,
    shapes_of,
    token_matrices,
    untied_tensor,
)
from poemerge.rules import is_head
from poemerge.tensor_files import Rows, TensorInfo
from poemerge.token_rows import TokenRows, match_rows
from poemerge.update import Dense, LowRank, Update


class FullExpert:
    """A full fine-tuned checkpoint; a prefix that only one side has in its names is bridged."""

    def __init__(self, name: str, folder: Path, base: Checkpoint, vocabulary: str) -> None:
        self.name, self.folder = name, folder
        self._checkpoint = Checkpoint(folder)
        self._names = align(name, folder, base, shapes_of(self._checkpoint))
        require_common(name, folder, base, self._names)
        self.untied = untied_tensor(self._checkpoint, self._names, base)
        tied = heads_from_embedding(self._names, self._checkpoint, base)
        self._names |= tied
        self.tokens = self._match(base, vocabulary)
        known = set(self._names.values())
        self.extra = tuple(
            name
            for name in self._checkpoint.tensors
            if name not in known and not (base.ties_embeddings and is_head(name))
        )
        if not self.tokens.kept:
            tables = token_matrices(self._names, base)
            self._names = {own: n for own, n in self._names.items() if own not in tables}
        stands = f"Expert {name!r} ties {{}} to its embedding, which stands for it here."
        notes = (self.tokens.note, *(stands.format(head) for head in tied))
        self.notes = tuple(note for note in notes if note)

    def _match(self, base: Checkpoint, vocabulary: str) -> TokenRows:
        """Check what it has of the base, and find the base's tokens among its own."""
        tables = token_matrices(self._names, base)
        for own, other in self._names.items():
            check_fit(
                self.name,
                self._checkpoint.tensors[other],
                base.tensors[own],
                any_rows=own in tables,
            )
        rows = {own: self._checkpoint.tensors[self._names[own]].shape[0] for own in tables}
        return match_rows(self.name, self.folder, rows, base, vocabulary)

    def votes(self, info: TensorInfo) -> bool:
        """True if the checkpoint holds the tensor."""
        return info.name in self._names

    def rank(self, info: TensorInfo) -> int | None:  # noqa: ARG002
        """None: a full fine-tune is dense everywhere."""
        return None

    def stored(self, info: TensorInfo) -> torch.dtype:
        """As the checkpoint's header says."""
        return self._checkpoint.tensors[self._names[info.name]].dtype

    def update(self, info: TensorInfo, base: Tensor) -> Update:
        """W - W₀."""
        delta = torch.empty_like(base)
        self.fill(info, base, delta, None)
        check_finite(delta, info.name, f"expert {self.name!r} ({self.folder})")
        return Dense(delta)

    def fill(self, info: TensorInfo, base: Tensor, out: Tensor, rows: Rows | None) -> None:
        """W - W₀."""
        order = self.tokens.order.get(info.name)
        subtract(self._checkpoint, (self._names[info.name], order), base, out, rows)

    def weight(self, info: TensorInfo, rows: Rows | None) -> Tensor | None:
        """As the checkpoint stores it."""
        return self._checkpoint.read(self._names[info.name], rows)

    def factors(self, info: TensorInfo) -> LowRank:
        """There are none."""
        raise AssertionError(f"{info.name} of a full fine-tune has no factors")

    def close(self) -> None:
        """Let go of the files."""
        self._checkpoint.close()
