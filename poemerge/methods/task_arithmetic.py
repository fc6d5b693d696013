"""Task arithmetic."""

from poemerge.method import Call, Merged, always, register
from poemerge.settings import Settings
from poemerge.task_vector import Stack


@register(
    settings=Settings, source="Ilharco et al. 2023, arXiv 2212.04089", factors=always, local=True
)
def task_arithmetic(stack: Stack, settings: Settings, call: Call) -> Merged:  # noqa: ARG001
    """Weighted sum of task vectors, scaled by `strength`: θ₀ + λ Σ w_i τ_i."""
    return Merged(stack.combine(call.weights))
