"""The product of Cauchy experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from poemerge.inference import Stop
from poemerge.method import Call, Merged, register
from poemerge.product import PUBLISHED, ProductSettings, cauchy_tail, product_of_experts
from poemerge.settings import setting
from poemerge.task_vector import Stack

PUBLISHED_STOP = 1e-5  # ||M_new - M||, absolute


@dataclass(frozen=True)
class CauchySettings(ProductSettings):
    """Settings of `cauchy_poe`."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**PUBLISHED, "scale": "paper", "max_steps": 50}
    }

    scale: str = setting(
        "equivariant",
        "what the Cauchy scale γ² is a multiple of: ||AᵀA||² (updates of every size alike) or "
        "||A||² (the paper's)",
        choices=("equivariant", "paper"),
    )
    epsilon: float = setting(
        0.1, "γ² in units of `scale`; large is Gaussian, small trusts the nearest expert", low=1e-12
    )
    max_steps: int = setting(100, "reweighting steps at most", low=1)
    rtol: float = setting(
        1e-6,
        "a step that moves the update by less than this, relative to its norm, is the last",
        low=0.0,
    )


@register(
    settings=CauchySettings,
    source="Bui et al. 2026, arXiv 2607.01689",
    structured=True,
    factors=True,
)
def cauchy_poe(stack: Stack, settings: CauchySettings, call: Call) -> Merged:
    """Mode of a product of Cauchy experts: reweighted solves whose energy never rises."""
    atol = PUBLISHED_STOP if settings.preset == "paper" else 0.0
    stop = Stop(settings.max_steps, settings.rtol, atol)
    tail = cauchy_tail(settings.scale, settings.epsilon)
    return product_of_experts(stack, settings, call, tail, stop)
