"""Weight averaging."""

import torch

from poemerge.method import Call, Merged, always, register
from poemerge.settings import Settings
from poemerge.task_vector import Stack


@register(
    settings=Settings, source="Wortsman et al. 2022, arXiv 2203.05482", factors=always, local=True
)
def average(stack: Stack, settings: Settings, call: Call) -> Merged:  # noqa: ARG001
    """Weighted mean of the experts' weights: θ₀ + Σ w_i τ_i / Σ w_i."""
    total = call.weights.sum(dim=-1, keepdim=True)
    return Merged(stack.combine(call.weights / torch.where(total > 0, total, 1.0)))
