"""DARE: drop at random and rescale, then TIES."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poemerge.method import Call, Merged, register
from poemerge.methods.ties import TiesSettings, trim_and_elect
from poemerge.settings import setting
from poemerge.task_vector import Stack
from poemerge.update import Dense


@dataclass(frozen=True)
class DareSettings(TiesSettings):
    """Settings of `dare_ties`."""

    keep: float = setting(
        1.0, "fraction of each tensor's entries that TIES keeps after the drop", low=0.0, high=1.0
    )
    drop: float = setting(
        0.7,
        "probability that an entry is dropped; the rest are divided by 1 - drop",
        low=0.0,
        high=0.99,
    )


@register(
    settings=DareSettings,
    source="Yu et al. 2024, arXiv 2311.03099",
    passes=115.0,  # most of them to draw masks
)
def dare_ties(stack: Stack, settings: DareSettings, call: Call) -> Merged:
    """Drop entries at random, rescale the rest to keep the expectation, then TIES."""
    dropped = drop_and_rescale(stack.dense(), settings.drop, call.seeds)
    return Merged(Dense(trim_and_elect(dropped, settings, call)))


def drop_and_rescale(deltas: Tensor, drop: float, seeds: tuple[tuple[int, ...], ...]) -> Tensor:
    """Zero each entry with probability `drop` and divide the others by 1 - drop.

    The mask is drawn on the CPU, so that every device drops the same entries.

    Args:
        deltas: (B, E, *shape).
        drop: probability in [0, 1).
        seeds: B × E seeds.
    """
    masks = [[_mask(deltas.shape[2:], drop, seed) for seed in row] for row in seeds]
    kept = torch.stack([torch.stack(row) for row in masks]).to(deltas.device)
    return deltas * kept / (1 - drop)


def _mask(shape: torch.Size, drop: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) >= drop
