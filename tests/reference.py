"""The equations of docs/family.md and docs/scale-and-ridge.md: slow, obvious, fp64, one by one.

Nothing here is shared with poemerge: no batches, no subspace, no Cholesky, no expanded squares.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Experts = Sequence[Tensor]  # A_i (O, I), fp64
Numbers = Sequence[float]  # one an expert


def gram(update: Tensor) -> Tensor:
    """G = A Aᵀ (O, O)."""
    return update @ update.T


def residual(merged: Tensor, update: Tensor) -> Tensor:
    """R(M) = Aᵀ (M - A) (I, I): the disagreement along the expert's own directions."""
    return update.T @ (merged - update)


def disagreement(merged: Tensor, update: Tensor) -> float:
    """q(M) = ||R(M)||²."""
    return float(residual(merged, update).square().sum())


def gaussian_energy(merged: Tensor, experts: Experts, weights: Numbers, ridge: float) -> float:
    """Σ ½ w_i q_i + λ/2 ||M||²."""
    energy = 0.5 * ridge * float(merged.square().sum())
    for update, weight in zip(experts, weights, strict=True):
        energy += 0.5 * weight * disagreement(merged, update)
    return energy


def cauchy_energy(
    merged: Tensor, experts: Experts, weights: Numbers, scales: Numbers, ridge: float
) -> float:
    """Σ ½ w_i log(γ_i² + q_i) + λ/2 ||M||²."""
    energy = 0.5 * ridge * float(merged.square().sum())
    for update, weight, scale in zip(experts, weights, scales, strict=True):
        energy += 0.5 * weight * math.log(scale + disagreement(merged, update))
    return energy


def system(experts: Experts, alphas: Numbers, ridge: float) -> tuple[Tensor, Tensor]:
    """H = Σ α_i G_i + λ I and b = Σ α_i G_i A_i."""
    rows, columns = experts[0].shape
    matrix = ridge * torch.eye(rows, dtype=torch.float64)
    right = torch.zeros(rows, columns, dtype=torch.float64)
    for update, alpha in zip(experts, alphas, strict=True):
        matrix = matrix + alpha * gram(update)
        right = right + alpha * gram(update) @ update
    return matrix, right


def mode(experts: Experts, alphas: Numbers, ridge: float) -> Tensor:
    """The M with H M = b."""
    return torch.linalg.solve(*system(experts, alphas, ridge))


def relative_ridge(experts: Experts, weights: Numbers, ridge: float) -> float:
    """λ = ridge · tr(Σ w_i G_i) / O."""
    trace = 0.0
    for update, weight in zip(experts, weights, strict=True):
        trace += weight * float(gram(update).trace())
    return ridge * trace / experts[0].shape[0]


def gaussian_poe(experts: Experts, weights: Numbers, ridge: float) -> Tensor:
    """The closed form, with a relative ridge; output side."""
    return mode(experts, weights, relative_ridge(experts, weights, ridge))


def cauchy_scales(experts: Experts, scale: str, epsilon: float) -> list[float]:
    """γ_i² = ε ||A_i||² (paper) or ε ||A_iᵀ A_i||² (equivariant)."""
    sizes = [a if scale == "paper" else a.T @ a for a in experts]
    return [epsilon * float(size.square().sum()) for size in sizes]


def cauchy_weights(
    merged: Tensor, experts: Experts, weights: Numbers, scales: Numbers
) -> list[float]:
    """α_i = w_i / (γ_i² + q_i)."""
    each = zip(experts, weights, scales, strict=True)
    return [weight / (scale + disagreement(merged, update)) for update, weight, scale in each]


def cauchy_poe(
    experts: Experts, weights: Numbers, ridge: float, scale: str, epsilon: float
) -> Tensor:
    """Reweighting from the Gaussian mode with equal weights; λ and γ fixed before; output side."""
    scales = cauchy_scales(experts, scale, epsilon)
    origin = cauchy_weights(torch.zeros_like(experts[0]), experts, weights, scales)
    fixed = relative_ridge(experts, origin, ridge)
    merged = mode(experts, [sum(origin) / len(origin)] * len(origin), fixed)
    for _ in range(500):
        before = merged
        merged = mode(experts, cauchy_weights(merged, experts, weights, scales), fixed)
        if torch.linalg.norm(merged - before) <= 1e-11 * torch.linalg.norm(merged):
            break
    return merged


def published(experts: Experts, epsilon: float | None) -> Tensor:
    """The published procedure; ε None is its Gaussian. Tall matrices go in square row chunks."""
    rows, columns = experts[0].shape
    if rows <= columns or rows % columns:
        return _published_chunk(experts, epsilon)
    chunks = [[a[start : start + columns] for a in experts] for start in range(0, rows, columns)]
    return torch.cat([_published_chunk(chunk, epsilon) for chunk in chunks])


def _published_chunk(experts: Experts, epsilon: float | None) -> Tensor:
    ones = [1.0] * len(experts)
    merged = mode(experts, ones, 1e-3)
    if epsilon is None:
        return merged
    scales = cauchy_scales(experts, "paper", epsilon)
    for _ in range(50):
        before = merged
        merged = mode(experts, cauchy_weights(merged, experts, ones, scales), 1e-3)
        if torch.linalg.norm(merged - before) < 1e-5:
            break
    return merged


def average(experts: Experts, weights: Numbers) -> Tensor:
    """Σ w_i A_i / Σ w_i."""
    return task_arithmetic(experts, weights) / sum(weights)


def task_arithmetic(experts: Experts, weights: Numbers) -> Tensor:
    """Σ w_i A_i."""
    merged = torch.zeros_like(experts[0])
    for update, weight in zip(experts, weights, strict=True):
        merged = merged + weight * update
    return merged


def ties(experts: Experts, weights: Numbers, keep: float) -> Tensor:
    """Trim each update to its largest entries, elect a sign an entry, average those that agree."""
    trimmed = [_trim(update, keep).flatten().tolist() for update in experts]
    merged = []
    for values in zip(*trimmed, strict=True):
        elected = sum(w * v for w, v in zip(weights, values, strict=True))
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if v * elected > 0]
        total = sum(w for w, _ in agree)
        merged.append(sum(w * v for w, v in agree) / total if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(experts[0].shape)


def _trim(update: Tensor, keep: float) -> Tensor:
    """Only the round(keep · n) largest magnitudes stay."""
    magnitudes = sorted(update.abs().flatten().tolist(), reverse=True)
    smallest = magnitudes[max(1, round(keep * len(magnitudes))) - 1]
    return torch.where(update.abs() >= smallest, update, 0.0)


def model_stock(experts: Experts, weights: Numbers) -> Tensor:
    """t · Σ p_i A_i with t = N cos θ / (1 + (N - 1) cos θ), N = 1 / Σ p_i² (Jang et al. 2024)."""
    says = _speaking(experts, weights)
    if not says:
        return torch.zeros_like(experts[0])
    total = sum(w for w, _ in says)
    mean = task_arithmetic([a for _, a in says], [w / total for w, _ in says])
    pairs = [(v * w, _cosine(a, b)) for (v, a), (w, b) in itertools.combinations(says, 2)]
    if not pairs:
        return mean
    cosine = max(0.0, sum(w * c for w, c in pairs) / sum(w for w, _ in pairs))
    count = total**2 / sum(w**2 for w, _ in says)
    return count * cosine / (1 + (count - 1) * cosine) * mean


def _speaking(experts: Experts, weights: Numbers) -> list[tuple[float, Tensor]]:
    return [(w, a) for w, a in zip(weights, experts, strict=True) if w and a.any()]


def _cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / left.norm() / right.norm())


def knots_ties(experts: Experts, weights: Numbers, keep: float) -> Tensor:
    """[√w_1 A_1 | √w_2 A_2 | ...] = U S [V_1 | V_2 | ...]ᵀ; U times TIES of the S V_iᵀ / √w_i."""
    says = _speaking(experts, weights)
    if not says:
        return torch.zeros_like(experts[0])
    basis, sizes, right = _nonzero_svd(torch.cat([w**0.5 * a for w, a in says], dim=1))
    parts = (torch.diag(sizes) @ right.T).split(experts[0].shape[1], dim=1)
    aligned = [part / w**0.5 for part, (w, _) in zip(parts, says, strict=True)]
    aligned = [torch.where(part.abs() > 1e-7 * sizes[0], part, 0.0) for part in aligned]
    return basis @ ties(aligned, [w for w, _ in says], keep)


def tsv_m(experts: Experts, weights: Numbers) -> Tensor:
    """Û diag(w_i s_i) V̂ᵀ of min(O, I) / N triplets an expert (Gargiulo et al. 2025)."""
    says = _speaking(experts, weights)
    if not says:
        return torch.zeros_like(experts[0])
    kept = max(1, min(experts[0].shape) // len(says))
    lefts, sizes, rights = [], [], []
    for weight, update in says:
        left, size, right = _nonzero_svd(update)
        lefts.append(left[:, :kept])
        sizes.append(weight * size[:kept])
        rights.append(right[:, :kept])
    left, right = procrustes(torch.cat(lefts, dim=1)), procrustes(torch.cat(rights, dim=1))
    return left @ torch.diag(torch.cat(sizes)) @ right.T


def procrustes(columns: Tensor) -> Tensor:
    """P Qᵀ of the singular value decomposition P S Qᵀ, as far as S is not zero."""
    left, _, right = _nonzero_svd(columns)
    return left @ right.T


def iso_c(experts: Experts, weights: Numbers) -> Tensor:
    """mean(S) U Vᵀ of Σ w_i A_i = U S Vᵀ, as far as S is not zero (Marczak et al. 2025)."""
    left, sizes, right = _nonzero_svd(task_arithmetic(experts, weights))
    return sizes.sum() / max(1, len(sizes)) * left @ right.T


def _nonzero_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V with the singular values above 1e-5 of the largest."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((sizes > 1e-5 * sizes[0]).sum())
    return left[:, :rank], sizes[:rank], right[:rank].T


def fisher_merging(experts: Experts, weights: Numbers, fishers: Experts) -> Tensor:
    """Σ w_i F_i ⊙ A_i / Σ w_i F_i, entry by entry (Matena and Raffel 2022)."""
    merged = torch.zeros_like(experts[0])
    for place in torch.cartesian_prod(*map(torch.arange, merged.shape)).tolist():
        each = zip(experts, weights, fishers, strict=True)
        says = [(w * float(f[tuple(place)]), float(a[tuple(place)])) for a, w, f in each]
        total = sum(say for say, _ in says)
        merged[tuple(place)] = sum(say * a for say, a in says) / total if total else 0.0
    return merged


def regmean(experts: Experts, weights: Numbers, activations: Experts) -> Tensor:
    """(Σ w_i C_i)⁻¹ Σ w_i C_i W_iᵀ, transposed, with C_i = X_iᵀ X_i (Jin et al. 2023)."""
    total = sum(w * c for w, c in zip(weights, activations, strict=True))
    right = sum(w * c @ a.T for w, c, a in zip(weights, activations, experts, strict=True))
    return (torch.linalg.inv(total) @ right).T


def wudi_objective(merged: Tensor, experts: Experts) -> Tensor:
    """Σ ||(M - A_i) A_iᵀ||² / ||A_i||² (Cheng et al. 2025)."""
    misses = [((merged - a) @ a.T).square().sum() / a.square().sum() for a in experts]
    return torch.stack(misses).sum()
