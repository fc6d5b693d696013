"""TIES: trim, elect sign, disjoint mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poemerge.method import Call, Merged, register
from poemerge.select import kth_largest_magnitude
from poemerge.settings import Settings, setting
from poemerge.task_vector import Dense, Stack

RUN = 1 << 16  # entries that are worked on at a time, so that they stay in the caches


@dataclass(frozen=True)
class TiesSettings(Settings):
    """Settings of `ties`."""

    keep: float = setting(
        0.2, "fraction of each tensor's entries kept, largest magnitudes first", low=0.0, high=1.0
    )


def threshold(update: Tensor, settings: TiesSettings) -> Tensor:
    """The smallest magnitude that is kept of a whole update: keep · n entries, 1 at least.

    Entries as large as that are all kept: which of them went would be arbitrary.
    """
    kept = max(1, round(settings.keep * update.numel()))
    if kept >= update.numel():
        return update.new_zeros(())
    return kth_largest_magnitude(update.flatten(), kept)


@register(
    settings=TiesSettings,
    source="Yadav et al. 2023, arXiv 2306.01708",
    local=True,
    prepare=threshold,
)
def ties(stack: Stack, settings: TiesSettings, call: Call) -> Merged:
    """Keep each task vector's largest entries, elect a sign per entry, average those that agree."""
    return Merged(Dense(trim_and_elect(stack.dense(), settings, call)))


def trim_and_elect(deltas: Tensor, settings: TiesSettings, call: Call) -> Tensor:
    """TIES (B, *shape) of updates (B, E, *shape)."""
    limits = call.prepared
    if limits is None:
        rows = [[threshold(update, settings) for update in batch] for batch in deltas]
        limits = torch.stack([torch.stack(row) for row in rows])
    flat = deltas.reshape(*deltas.shape[:2], -1)
    merged = flat.new_empty(flat.shape[0], flat.shape[-1])
    say = call.weights.to(flat).unsqueeze(-1)
    for run, out in zip(flat.split(RUN, dim=-1), merged.split(RUN, dim=-1), strict=True):
        out.copy_(elect_and_average(run, limits.unsqueeze(-1), say))
    return merged.view(deltas.shape[0], *deltas.shape[2:])


def elect_and_average(deltas: Tensor, limits: Tensor, say: Tensor) -> Tensor:
    """Mean (B, N) over the experts whose sign agrees with that of the weighted sum.

    Args:
        deltas: (B, E, N).
        limits: smallest magnitude that counts (B, E, 1).
        say: of the experts (B, E, 1).
    """
    weighted = torch.where(deltas.abs() >= limits, deltas, 0.0).mul_(say)
    agrees = weighted * weighted.sum(dim=1, keepdim=True) > 0
    votes = (agrees * say).sum(dim=1)
    return (weighted * agrees).sum(dim=1) / votes.clamp_min_(torch.finfo(deltas.dtype).tiny)
