"""The mode of a product of Cauchy experts, dense, in fp64: slow, and independent of `poemerge`.

What tests/reference.py does at test size, with each gram formed once and LU for the solves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.published import disagreement, form
from poemerge.poe.settings import HeavySettings

RTOL = 1e-11
MAX_STEPS = 500


def fixed_point(updates: Tensor, settings: HeavySettings) -> Tensor:
    """M (O, I) for updates (E, O, I): the input side is the output side of the transposes."""
    if settings.side == "input":
        return _output_side(updates.mT.double(), settings).T
    return _output_side(updates.double(), settings)


def _output_side(updates: Tensor, settings: HeavySettings) -> Tensor:
    grams, targets = (torch.stack(part) for part in zip(*map(form, updates), strict=True))
    sized = updates if settings.scale == "paper" else grams
    scales = settings.epsilon * sized.square().sum(dim=(1, 2))
    origin = 1 / (scales + grams.square().sum(dim=(1, 2)))  # the weights at M = 0
    if settings.ridge_mode == "absolute":
        ridge, start = settings.ridge, torch.ones_like(origin)
    else:
        trace = (origin * updates.square().sum(dim=(1, 2))).sum()
        ridge = settings.ridge * float(trace) / updates.shape[1]
        start = origin.mean().expand_as(origin)
    merged = _mode(grams, targets, start, ridge)
    for _ in range(MAX_STEPS):
        before, alphas = merged, 1 / (scales + _disagreements(merged, updates))
        merged = _mode(grams, targets, alphas, ridge)
        if distance(merged, before) <= RTOL:
            break
    return merged


def _disagreements(merged: Tensor, updates: Sequence[Tensor]) -> Tensor:
    return torch.stack([disagreement(merged, update) for update in updates])


def _mode(grams: Tensor, targets: Tensor, alphas: Tensor, ridge: float) -> Tensor:
    matrix = torch.einsum("e,eij->ij", alphas, grams)
    matrix.diagonal().add_(ridge)
    return torch.linalg.solve(matrix, torch.einsum("e,eij->ij", alphas, targets))


def distance(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in fp64."""
    expected = expected.double()
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))
