"""Experts on disk, full checkpoints and LoRA adapters alike, seen as updates of the base."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from poemerge.adapter import is_adapter
from poemerge.checkpoint import Checkpoint
from poemerge.experts.adapted import AdapterExpert
from poemerge.experts.full import FullExpert
from poemerge.tensor_files import Rows, TensorInfo
from poemerge.token_rows import REFUSE, TokenRows
from poemerge.update import LowRank, Update


class Expert(Protocol):
    """One expert; names are the base's."""

    name: str
    folder: Path
    extra: tuple[str, ...]  # tensors that cannot be merged, since the base lacks or ties them
    untied: str  # a tensor that it changes at one end of what the base ties; empty if there is none
    tokens: TokenRows  # how its rows of embedding and head lie to the base's
    notes: tuple[str, ...]  # sentences on what was bridged

    def votes(self, info: TensorInfo) -> bool:
        """False if the expert lacks this tensor, so that the others decide alone."""

    def rank(self, info: TensorInfo) -> int | None:
        """Rank of its update in factors, 0 where it leaves the tensor alone, None if dense."""

    def stored(self, info: TensorInfo) -> torch.dtype:
        """Dtype of the weight, or of its factors, on disk; the base's where there is neither."""

    def update(self, info: TensorInfo, base: Tensor) -> Update:
        """A = W - W₀ in fp32 or better, given W₀ in fp32; finite, or CheckpointError."""

    def fill(self, info: TensorInfo, base: Tensor, out: Tensor, rows: Rows | None) -> None:
        """Write the dense update of those rows into `out`, given W₀ there; it may not be finite."""

    def factors(self, info: TensorInfo) -> LowRank:
        """The update in factors, fp32, on the CPU, where `rank` is a number; maybe not finite."""

    def weight(self, info: TensorInfo, rows: Rows | None) -> Tensor | None:
        """Its own rows of a tensor as they are stored; None where it has an update in factors."""

    def close(self) -> None:
        """Let go of the files."""


def open_expert(name: str, folder: Path, base: Checkpoint, vocabulary: str = REFUSE) -> Expert:
    """Open `folder` as an adapter or a full checkpoint that was fine-tuned from `base`.

    Args:
        name: of the expert.
        folder: of the expert.
        base: checkpoint.
        vocabulary: what becomes of token rows that do not fit: `refuse`, `pad` or `base`.

    Raises:
        SourceError: there is nothing to open.
        CheckpointError: it does not fit the base.
    """
    kind = AdapterExpert if is_adapter(folder) else FullExpert
    return kind(name, folder, base, vocabulary)
