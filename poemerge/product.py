"""A product of experts over a stack of task vectors: from settings to mode and certificate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poemerge.experts import Cauchy, Gaussian, Grams, Tail
from poemerge.inference import Mode, Stop, solve
from poemerge.method import Call, Merged
from poemerge.settings import Settings, setting
from poemerge.task_vector import Dense, DenseStack, Lift, Stack

PUBLISHED: Mapping[str, Any] = {
    "side": "output",
    "ridge": 1e-3,
    "ridge_mode": "absolute",
    "chunks": "square",
}


@dataclass(frozen=True)
class ProductSettings(Settings):
    """Settings of every product of experts."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PUBLISHED}

    side: str = setting(
        "input",
        "where disagreement is measured: along the features that a layer reads (Aᵀ A, which theory "
        "favours for linear layers) or along those that it writes (A Aᵀ, as published)",
        choices=("input", "output"),
    )
    ridge: float = setting(
        3e-2, "precision λ of the prior that pulls the update towards 0", low=0.0
    )
    ridge_mode: str = setting(
        "relative",
        "unit of `ridge`: the mean diagonal of the experts' precision, or 1 (which shrinks small "
        "updates hard)",
        choices=("relative", "absolute"),
    )
    chunks: str = setting(
        "none",
        "cut tall dense matrices (O a multiple of I) into square row chunks, each solved apart, as "
        "the published code does with fused layers",
        choices=("none", "square"),
    )
    preset: str = setting(
        "",
        "`paper` takes side, scale, ridge, chunks and stopping rule from the published procedure",
        choices=("", "paper"),
    )


TailOf = Callable[[Grams, Tensor], Tail]


def product_of_experts(
    stack: Stack, settings: ProductSettings, call: Call, tail_of: TailOf, stop: Stop
) -> Merged:
    """Solve every matrix of the stack for the mode of its product of experts.

    Args:
        stack: task vectors of B matrices (O, I).
        settings: side, ridge and chunks.
        call: weights of the experts.
        tail_of: builds the experts' tail from their forms and trust (B, E).
        stop: when a heavy-tailed solve ends.
    """
    updates, lift, chunks = _cut(stack, settings)
    turned = updates.mT if settings.side == "input" else updates
    whole = turned.shape[-2] if chunks > 1 else stack.shape[settings.side == "input"]
    forms = Grams.of(turned, whole)
    trust = call.weights.to(forms.norms) * (forms.norms > 0)
    tail = tail_of(forms, trust)
    start, ridge = _start_and_ridge(forms, tail, settings)
    mode = solve(forms, tail, start, ridge, stop)
    merged = mode.merged.mT if settings.side == "input" else mode.merged
    return Merged(lift(merged), _certificates(mode, forms, chunks))


def _cut(stack: Stack, settings: ProductSettings) -> tuple[Tensor, Lift, int]:
    """The matrices to solve, the way back, and the number of chunks per matrix."""
    updates, lift = stack.coordinates()
    rows, columns = stack.shape
    if settings.chunks == "none" or rows % columns or not isinstance(stack, DenseStack):
        return updates, lift, 1
    count = rows // columns
    pieces = updates.reshape(*updates.shape[:2], count, columns, columns)
    return (
        pieces.transpose(1, 2).flatten(0, 1),
        lambda m: Dense(m.reshape(-1, rows, columns)),
        count,
    )


def _start_and_ridge(forms: Grams, tail: Tail, settings: ProductSettings) -> tuple[Tensor, Tensor]:
    """Weights (B, E) of the Gaussian mode to start from, and λ (B,).

    The relative ridge is fixed at the weights that the experts have at M = 0 (docs/maths.md,
    section 3), and the equal weights of the start are on the same footing.
    """
    reference = tail.weights(forms.origins)
    voting = (reference > 0).to(reference)
    if settings.ridge_mode == "absolute":
        ridge, equal = torch.full_like(reference[:, 0], settings.ridge), voting
    else:
        ridge = settings.ridge * forms.mean_diagonal(reference)
        count = voting.sum(dim=-1, keepdim=True).clamp_min(1)
        equal = voting * reference.sum(dim=-1, keepdim=True) / count
    ridge = torch.where(voting.any(dim=-1), ridge, torch.ones_like(ridge))
    return (reference if isinstance(tail, Gaussian) else equal), ridge


def cauchy_tail(scale: str, epsilon: float) -> TailOf:
    """Cauchy experts with γ_i² = ε ||A_i||² (`paper`) or ε ||A_iᵀ A_i||² (`equivariant`).

    The published scale grows with the square of an update while its residual grows with the fourth
    power; the equivariant one treats updates of every size alike.
    """

    def build(forms: Grams, trust: Tensor) -> Tail:
        size = forms.norms if scale == "paper" else forms.origins
        return Cauchy(trust, torch.where(trust > 0, epsilon * size, torch.ones_like(size)))

    return build


def gaussian_tail(_: Grams, trust: Tensor) -> Tail:
    """Gaussian experts with the given trust (B, E)."""
    return Gaussian(trust)


def _certificates(mode: Mode, forms: Grams, chunks: int) -> tuple[Mapping[str, Any], ...]:
    """One certificate a matrix; chunks of one matrix are added up, or stand for their worst."""

    def per_matrix(values: Tensor) -> Tensor:
        return values.reshape(-1, chunks, *values.shape[1:]).cpu()

    weights = per_matrix(mode.weights).mean(dim=1)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo().tiny)
    norms = per_matrix(forms.norms).sum(dim=1).amax(dim=-1)
    merged = per_matrix(mode.merged.square().sum(dim=(-2, -1), dtype=torch.float64)).sum(dim=1)
    columns = {
        "steps": per_matrix(mode.steps).amax(dim=1),
        "converged": per_matrix(mode.converged).all(dim=1),
        "energies": torch.stack([per_matrix(e).sum(dim=1) for e in mode.energies], dim=1),
        "weights": weights,
        "residual": per_matrix(mode.residual).amax(dim=1),
        "condition": per_matrix(mode.condition).amax(dim=1),
        "growth": (merged / norms.clamp_min(torch.finfo().tiny)).sqrt(),
    }
    lists = {name: values.tolist() for name, values in columns.items()}
    taken = zip(lists["energies"], lists["steps"], strict=True)
    lists["energies"] = [energies[: steps + 1] for energies, steps in taken]
    return tuple(dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
