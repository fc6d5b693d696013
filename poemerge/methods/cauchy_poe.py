"""The product of Cauchy experts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poemerge.method import Call, Merged, register
from poemerge.poe.experts import Form
from poemerge.poe.product import product_of_experts
from poemerge.poe.scale import scales
from poemerge.poe.settings import HeavySettings
from poemerge.poe.solver import Energy, Measure
from poemerge.task_vector import Stack


@dataclass(frozen=True)
class Cauchy:
    """E = ½ w log(γ² + q), weight w / (γ² + q): far-off experts lose their say."""

    is_robust: ClassVar[bool] = True

    trust: Tensor  # w (B, E)
    scale: Tensor  # γ² (B, E), positive

    def energy(self, residuals: Tensor) -> Tensor:
        """½ w log(γ² + q)."""
        return 0.5 * self.trust * torch.log(self.scale + residuals)

    def weights(self, residuals: Tensor) -> Tensor:
        """Weight w / (γ² + q)."""
        return self.trust / (self.scale + residuals)


@register(
    settings=HeavySettings,
    source="Bui et al. 2026, arXiv 2607.01689",
    structured=lambda settings: settings.is_structured,
    factors=lambda settings: settings.keeps_factors,
)
def cauchy_poe(stack: Stack, settings: HeavySettings, call: Call) -> Merged:
    """Mode of a product of Cauchy experts: reweighted solves whose energy never rises."""

    def tail_of(form: Form, trust: Tensor, measure: Measure) -> Cauchy:
        scale = scales(form, trust, measure, scale=settings.scale, epsilon=settings.epsilon)
        return Cauchy(trust, scale)

    return product_of_experts(stack, Energy(settings, tail_of, settings.stop), call)
