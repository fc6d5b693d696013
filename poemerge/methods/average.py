"""Weight averaging."""

from poemerge.method import Call, Merged, register
from poemerge.settings import Settings
from poemerge.task_vector import Stack


@register(settings=Settings, source="Wortsman et al. 2022, arXiv 2203.05482", factors=True)
def average(stack: Stack, settings: Settings, call: Call) -> Merged:  # noqa: ARG001
    """Weighted mean of the experts' weights: θ₀ + Σ w_i τ_i / Σ w_i."""
    total = call.weights.sum()
    return Merged(stack.combine(call.weights / total if total > 0 else call.weights))
