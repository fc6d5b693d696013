"""TIES: trim, elect sign, disjoint mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poemerge.method import Call, Merged, register
from poemerge.settings import Settings, setting
from poemerge.task_vector import Dense, Stack


@dataclass(frozen=True)
class TiesSettings(Settings):
    """Settings of `ties`."""

    keep: float = setting(
        0.2, "fraction of each tensor's entries kept, largest magnitudes first", low=0.0, high=1.0
    )


@register(settings=TiesSettings, source="Yadav et al. 2023, arXiv 2306.01708")
def ties(stack: Stack, settings: TiesSettings, call: Call) -> Merged:
    """Keep each task vector's largest entries, elect a sign per entry, average those that agree."""
    return Merged(Dense(elect_and_average(trim(stack.dense(), settings.keep), call.weights)))


def trim(deltas: Tensor, keep: float) -> Tensor:
    """Zero all but the keep · n (at least 1) largest magnitudes of each update (B, E, *shape).

    Entries as large as the smallest one kept are kept too: which of them went would be arbitrary.
    """
    size = deltas[0, 0].numel()
    kept = max(1, round(keep * size))
    if kept >= size:
        return deltas
    magnitude = deltas.flatten(2).abs()
    threshold = torch.kthvalue(magnitude, size - kept + 1, dim=-1, keepdim=True).values
    return deltas * (magnitude >= threshold).view_as(deltas)


def elect_and_average(deltas: Tensor, weights: Tensor) -> Tensor:
    """Mean over the experts whose sign agrees with that of the weighted sum; (B, E, *shape)."""
    weighted = deltas * weights.to(deltas).view(1, -1, *[1] * (deltas.ndim - 2))
    agrees = (deltas.sign() == weighted.sum(dim=1, keepdim=True).sign()) & (deltas != 0)
    votes = torch.einsum("be...,e->b...", agrees.to(deltas), weights.to(deltas))
    return (weighted * agrees).sum(dim=1) / votes.clamp_min(torch.finfo(deltas.dtype).tiny)
