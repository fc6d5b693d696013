"""Model Stock: the mean, drawn to the base as far as the experts disagree."""

import torch
from torch import Tensor

from poemerge.method import Call, Merged, always, register
from poemerge.settings import Settings
from poemerge.task_vector import Stack


@register(settings=Settings, source="Jang et al. 2024, arXiv 2403.19522", factors=always)
def model_stock(stack: Stack, settings: Settings, call: Call) -> Merged:  # noqa: ARG001
    """Mean of the task vectors times t = N cos θ / (1 + (N - 1) cos θ), tensor by tensor.

    θ is the mean angle between two experts. With shares p_i = w_i / Σ w the mean is the weighted
    one, N = 1 / Σ p_i² and cos θ the mean over pairs, weighted by p_i p_j. One expert alone is left
    as it is. Updates of zeros have no angle and no say. Experts that point apart, cos θ < 0, share
    nothing that could be told from chance: t is 0, where the formula would leave the base in the
    direction that the experts have not taken.
    """
    products = stack.inner()
    norms = products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (B, E)
    say = call.weights * (norms > 0)
    shares = _ratio(say, say.sum(dim=-1, keepdim=True))
    toward = toward_mean(_ratio(products, norms.unsqueeze(-1) * norms.unsqueeze(-2)), shares)
    return Merged(stack.combine(toward * shares))


def toward_mean(cosines: Tensor, shares: Tensor) -> Tensor:
    """Factor t (B, 1), 0 to 1, from the pairwise cosines (B, E, E) and the shares p (B, E)."""
    alone = shares.square().sum(dim=-1)  # 1 / N
    together = torch.einsum("bi,bij,bj->b", shares, cosines, shares)  # of an expert with itself too
    cosine = torch.where(alone < 1, _ratio(together - alone, 1 - alone), 1.0).clamp(0, 1)
    return _ratio(cosine, alone + (1 - alone) * cosine).unsqueeze(-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Quotient, 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole, 0.0)
