"""How far off an expert may be before it loses its say: the scale γ of a heavy tail.

`paper` and `equivariant` follow from the updates alone, `estimated` from how far the experts really
are from one another: the maximum-likelihood scale, and degrees of freedom, of the relative
residuals u_i = q_i / q_i(0) at the Gaussian mode (docs/scale-and-ridge.md).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from poemerge.poe.experts import Form

ESTIMATED = "estimated"
FLOOR = 1e-6  # of an estimated scale: identical experts have no residuals at all
HALVINGS = 60
DEGREES = tuple(10 ** (k / 10) for k in range(21))  # 1 (Cauchy) to 100 (all but Gaussian)


def scales(
    form: Form,
    trust: Tensor,
    measure: Callable[[], Tensor],
    *,
    scale: str,
    epsilon: float,
    nu: Tensor | float = 1.0,
) -> Tensor:
    """γ² (B, E), positive.

    Args:
        form: the experts' residual forms.
        trust: w (B, E).
        measure: gives u (B, E) when it is needed.
        scale: `paper`: ε ||A||²; `equivariant`: ε q(0), which is ε ||A Aᵀ||² for grams;
            `estimated`: ε ŝ q(0), ŝ of a Student-t with `nu` degrees of freedom.
        epsilon: ε.
        nu: degrees of freedom, for all or (B,); 1 is Cauchy.
    """
    if scale == "paper":
        size = form.norms
    elif scale == "equivariant":
        size = form.origins
    else:
        counted = trust * (form.origins > 0)
        estimate, _ = likeliest(measure(), counted, torch.zeros_like(trust[:, 0]) + nu)
        size = form.origins * estimate.unsqueeze(-1)
    # An expert that wants no change has no size of its own: it gets the others'.
    known = (trust > 0) & (size > 0)
    count = known.sum(dim=-1, keepdim=True)
    usual = (size * known).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    usual = torch.where(count > 0, usual, 1.0)
    return epsilon * torch.where(known, size, usual)


def degrees_of_freedom(u: Tensor, trust: Tensor) -> Tensor:
    """The likeliest ν (B,) of relative residuals u (B, E), with the scale that goes with it."""
    fits = [likeliest(u, trust, torch.full_like(u[:, 0], nu))[1] for nu in DEGREES]
    best = torch.stack(fits).argmax(dim=0)
    return torch.tensor(DEGREES, dtype=u.dtype, device=u.device)[best]


def likeliest(u: Tensor, trust: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """The scale ŝ (B,) of maximum likelihood, and the log-likelihood there.

    r = √u is Student-t with scale √s: Σ w ((ν + 1) u / (ν s + u) - 1) = 0, which falls in s, so
    halving the interval of log s finds it.
    """
    low = torch.full_like(nu, math.log(FLOOR))
    high = u.amax(dim=-1).clamp_min(FLOOR).log() + math.log(1e3)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        spread = nu * middle.exp()
        slope = trust * ((nu + 1).unsqueeze(-1) * u / (spread.unsqueeze(-1) + u) - 1)
        too_small = slope.sum(dim=-1) > 0
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    scale = high.exp()
    return scale, _log_likelihood(u, trust, nu, scale)


def _log_likelihood(u: Tensor, trust: Tensor, nu: Tensor, scale: Tensor) -> Tensor:
    spread = (nu * scale).unsqueeze(-1)
    constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * scale).log()
    each = constant.unsqueeze(-1) - (nu.unsqueeze(-1) + 1) / 2 * torch.log1p(u / spread)
    return (trust * each).sum(dim=-1)
