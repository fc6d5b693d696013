"""The product of Student-t experts: from Cauchy to Gaussian by one number."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poemerge.method import Call, Merged, register
from poemerge.poe.experts import Form
from poemerge.poe.product import product_of_experts
from poemerge.poe.scale import ESTIMATED, degrees_of_freedom, scales
from poemerge.poe.settings import HeavySettings
from poemerge.poe.solver import Energy, Measure
from poemerge.settings import setting
from poemerge.task_vector import Stack


@dataclass(frozen=True)
class StudentT:
    """E = ½ w (ν + 1) log(1 + q / (ν γ²)), weight w (ν + 1) / (ν γ² + q)."""

    is_robust: ClassVar[bool] = True

    trust: Tensor  # w (B, E)
    scale: Tensor  # γ² (B, E), positive
    degrees: Tensor  # ν (B, 1)

    def energy(self, residuals: Tensor) -> Tensor:
        """½ w (ν + 1) log(1 + q / (ν γ²))."""
        relative = residuals / (self.degrees * self.scale)
        return 0.5 * self.trust * (self.degrees + 1) * torch.log1p(relative)

    def weights(self, residuals: Tensor) -> Tensor:
        """Weight w (ν + 1) / (ν γ² + q)."""
        return self.trust * (self.degrees + 1) / (self.degrees * self.scale + residuals)


@dataclass(frozen=True)
class StudentSettings(HeavySettings):
    """Settings of `student_t_poe`."""

    nu: float | str = setting(
        4.0,
        "degrees of freedom ν: 1 is Cauchy, large is Gaussian; `estimated`: the likeliest between "
        "1 and 100, matrix by matrix",
        low=1e-3,
        words=(ESTIMATED,),
    )


@register(
    settings=StudentSettings,
    source="after Bui et al. 2026, arXiv 2607.01689",
    structured=lambda settings: settings.is_structured,
    factors=lambda settings: settings.keeps_factors,
)
def student_t_poe(stack: Stack, settings: StudentSettings, call: Call) -> Merged:
    """Mode of a product of Student-t experts: heavy tails of a chosen or estimated weight."""

    def tail_of(form: Form, trust: Tensor, measure: Measure) -> StudentT:
        if settings.nu == ESTIMATED:
            degrees = degrees_of_freedom(measure(), trust * (form.origins > 0))
        else:
            degrees = torch.full_like(trust[:, 0], float(settings.nu))
        scale = scales(
            form, trust, measure, scale=settings.scale, epsilon=settings.epsilon, nu=degrees
        )
        return StudentT(trust, scale, degrees.unsqueeze(-1))

    return product_of_experts(stack, Energy(settings, tail_of, settings.stop), call)
