"""The product of Gaussian experts."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from poemerge.method import Call, Merged, register
from poemerge.poe.experts import Form
from poemerge.poe.inference import Stop
from poemerge.poe.product import product_of_experts
from poemerge.poe.settings import ProductSettings
from poemerge.poe.solver import Energy, Measure
from poemerge.task_vector import Stack


@dataclass(frozen=True)
class Gaussian:
    """E = ½ w q, weight w: the residual counts by its square, however large."""

    is_robust: ClassVar[bool] = False

    trust: Tensor  # w (B, E)

    def energy(self, residuals: Tensor) -> Tensor:
        """½ w q."""
        return 0.5 * self.trust * residuals

    def weights(self, residuals: Tensor) -> Tensor:  # noqa: ARG002
        """The trust itself, whatever M."""
        return self.trust


@register(
    settings=ProductSettings,
    source="Bui et al. 2026, arXiv 2607.01689",
    structured=lambda settings: settings.is_structured,
    factors=lambda settings: settings.keeps_factors,
)
def gaussian_poe(stack: Stack, settings: ProductSettings, call: Call) -> Merged:
    """Mode of a product of Gaussian experts: one linear solve a matrix."""

    def tail_of(_form: Form, trust: Tensor, _measure: Measure) -> Gaussian:
        return Gaussian(trust)

    return product_of_experts(stack, Energy(settings, tail_of, Stop(max_steps=0, rtol=0.0)), call)
