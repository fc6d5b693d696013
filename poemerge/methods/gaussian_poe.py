"""The product of Gaussian experts."""

from poemerge.inference import Stop
from poemerge.method import Call, Merged, register
from poemerge.product import ProductSettings, gaussian_tail, product_of_experts
from poemerge.task_vector import Stack


@register(
    settings=ProductSettings,
    source="Bui et al. 2026, arXiv 2607.01689",
    structured=True,
    factors=True,
)
def gaussian_poe(stack: Stack, settings: ProductSettings, call: Call) -> Merged:
    """Mode of a product of Gaussian experts: one linear solve a matrix."""
    closed_form = Stop(max_steps=0, rtol=0.0)
    return product_of_experts(stack, settings, call, gaussian_tail, closed_form)
