"""The published procedure, written down plainly: what the solvers are measured against.

Output side, Cauchy experts (docs/maths.md, section 1). Written from the equations; it shares
nothing with `poemerge`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # λ, absolute
MAX_STEPS = 50
ATOL = 1e-5  # a step that moves M by less than this, absolute, is the last

Form = tuple[Tensor, Tensor]  # G = A Aᵀ (O, O), G A (O, I)


@dataclass(frozen=True)
class Outcome:
    """What the procedure ends with."""

    merged: Tensor  # M (O, I)
    steps: tuple[int, ...]  # reweightings after the first solve, of each chunk
    settled: bool  # the stopping rule fired


def published(
    updates: Tensor,
    epsilon: float,
    *,
    cached: bool = False,
    max_steps: int = MAX_STEPS,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """Merge the updates of one matrix.

    Args:
        updates: A (E, O, I).
        epsilon: γ_i² = ε ||A_i||².
        cached: form A_i A_iᵀ and A_i A_iᵀ A_i once, not in each step.
        max_steps: reweightings at most.
        dtype: to compute in.
    """
    updates = updates.to(dtype)
    scales = [epsilon * update.square().sum() for update in updates]
    forms = [form(update) for update in updates] if cached else []
    merged = _mode(updates, forms, [torch.ones_like(scale) for scale in scales])
    for step in range(1, max_steps + 1):
        alphas = [
            1 / (scale + disagreement(merged, update))
            for scale, update in zip(scales, updates, strict=True)
        ]
        before, merged = merged, _mode(updates, forms, alphas)
        if float(torch.linalg.norm(merged - before)) < ATOL:
            return Outcome(merged, (step,), settled=True)
    return Outcome(merged, (max_steps,), settled=False)


def published_in_chunks(updates: Tensor, epsilon: float, **options: bool | int) -> Outcome:
    """The procedure on each square row chunk, as it treats tall matrices of full fine-tunes."""
    parts = [published(chunk, epsilon, **options) for chunk in square_chunks(updates)]
    return Outcome(
        torch.cat([part.merged for part in parts]),
        sum((part.steps for part in parts), ()),
        all(part.settled for part in parts),
    )


def square_chunks(updates: Tensor) -> Sequence[Tensor]:
    """Cut (..., O, I) into O / I chunks (..., I, I)."""
    return updates.split(updates.shape[-1], dim=-2)


def form(update: Tensor) -> Form:
    """Gram A Aᵀ and its product with A."""
    gram = update @ update.T
    return gram, gram @ update


def disagreement(merged: Tensor, update: Tensor) -> Tensor:
    """Squared norm q of the I × I residual Aᵀ (M - A)."""
    return (update.T @ (merged - update)).square().sum()


def energy(merged: Tensor, updates: Tensor, epsilon: float) -> float:
    """Σ ½ log(γ_i² + q_i) + λ/2 ||M||², in fp64.

    Args:
        merged: M (O, I).
        updates: A (E, O, I).
        epsilon: γ_i² = ε ||A_i||².
    """
    merged = merged.double()
    total = 0.5 * RIDGE * merged.square().sum()
    for update in updates:
        exact = update.double()
        scale = epsilon * exact.square().sum()
        total = total + 0.5 * torch.log(scale + disagreement(merged, exact))
    return float(total)


def _mode(updates: Tensor, forms: Sequence[Form], alphas: Sequence[Tensor]) -> Tensor:
    """The M with (Σ α G + λ I) M = Σ α G A."""
    matrix = torch.zeros(updates.shape[1], updates.shape[1]).to(updates)
    matrix.diagonal().fill_(RIDGE)
    right = torch.zeros_like(updates[0])
    for index, (update, alpha) in enumerate(zip(updates, alphas, strict=True)):
        gram, target = forms[index] if forms else form(update)
        matrix += alpha * gram
        right += alpha * target
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
