"""Merges of tiny models, and what their folders hold."""

import shutil
from pathlib import Path

from torch import Tensor

from poemerge import MergeReport
from poemerge.checkpoint import Checkpoint
from poemerge.merge import merge_checkpoints
from tests.zoo import Zoo


def merge(
    zoo: Zoo, out: Path, method: str = "cauchy_poe", *seeds: int, **options: object
) -> MergeReport:
    """Merge full fine-tunes of the default base."""
    experts = {f"e{seed}": zoo.full(seed) for seed in seeds or (1, 2, 3)}
    return merge_checkpoints(zoo.base(), experts, out, method, "cpu", **options)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as they are stored."""
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def rules(report: MergeReport) -> dict[str, str]:
    """What was done with each tensor, by its name."""
    return {tensor.name: tensor.rule for tensor in report.tensors}


def copy(folder: Path, to: Path) -> Path:
    """A copy of a folder, for a test to change."""
    return Path(shutil.copytree(folder, to))
