"""TIES: trim, elect sign, disjoint mean."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from poemerge.method import Call, Merged, register
from poemerge.settings import Settings, setting
from poemerge.task_vector import Stack
from poemerge.update import Dense

EVEN = 1e-6  # part of Σ w |τ| below which a vote is even
RUN = 1 << 16  # entries that a CPU works on at a time, so that they stay in its caches


@dataclass(frozen=True)
class TiesSettings(Settings):
    """Settings of `ties`."""

    keep: float = setting(
        0.2, "fraction of each tensor's entries kept, largest magnitudes first", low=0.0, high=1.0
    )


def threshold(update: Tensor, settings: TiesSettings) -> Tensor:
    """The smallest magnitude that is kept of a whole update: keep · n entries, 1 at least.

    Entries as large as that are all kept: which of them went would be arbitrary. The update is
    spoilt.
    """
    rest = update.numel() - max(1, round(settings.keep * update.numel()))
    if rest <= 0:
        return update.new_zeros(())
    magnitudes = update.abs_().flatten()
    if magnitudes.is_cuda:
        return magnitudes.sort().values[rest].clone()  # kthvalue takes one block of the card
    magnitudes.numpy().partition(rest)  # ten times faster than kthvalue, where SIMD helps
    return magnitudes[rest].clone()  # the update may be filled anew


@register(
    settings=TiesSettings,
    source="Yadav et al. 2023, arXiv 2306.01708",
    local=True,
    prepare=threshold,
    passes=50.0,  # most of them to find the threshold
)
def ties(stack: Stack, settings: TiesSettings, call: Call) -> Merged:
    """Keep each task vector's largest entries, elect a sign per entry, average those that agree."""
    return Merged(Dense(trim_and_elect(stack.dense(), settings, call)))


def trim_and_elect(deltas: Tensor, settings: TiesSettings, call: Call) -> Tensor:
    """TIES (B, *shape) of updates (B, E, *shape)."""
    limits = call.prepared
    if limits is None:
        found = [[threshold(update.clone(), settings) for update in batch] for batch in deltas]
        limits = torch.stack([torch.stack(row) for row in found])
    # The largest number below what is kept: `hardshrink` zeroes all up to it.
    below = torch.nextafter(limits, limits.new_full((), -1.0)).clamp_min(0).tolist()
    flat = deltas.reshape(*deltas.shape[:2], -1)
    merged = flat.new_empty(flat.shape[0], flat.shape[-1])
    length = flat.shape[-1] if flat.is_cuda else RUN
    for index, updates in enumerate(flat):
        say = call.weights[index].to(flat).unsqueeze(0)
        runs = zip(updates.split(length, -1), merged[index].split(length, -1), strict=True)
        for run, out in runs:
            kept = [hardshrink(row, low) for row, low in zip(run, below[index], strict=True)]
            out.copy_(elect_and_average(torch.stack(kept), say))
    return merged.view(deltas.shape[0], *deltas.shape[2:])


def elect_and_average(updates: Tensor, say: Tensor) -> Tensor:
    """Mean (N,) over the experts whose sign agrees with that of the weighted sum.

    A sum that is zero but for rounding elects nobody, on every device alike. With s the elected
    sign, Σ w τ and Σ w |τ| give the sum over those that agree as their half-sum (half-difference
    where s is negative); signs in place of τ give the sum of their weights.

    Args:
        updates: τ (E, N), trimmed.
        say: w (1, E).
    """
    total, size = say @ updates, say @ updates.abs()
    signs = updates.sign()
    elected = total.sign() * (total.abs() > EVEN * size)
    votes = say @ signs.abs() + elected * (say @ signs)
    return ((total + elected * size) / votes.clamp_min(torch.finfo(updates.dtype).tiny)).squeeze(0)
