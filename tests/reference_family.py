"""The whole family of docs/family.md: any precision, tail, scale and piece; slow, obvious, fp64.

A matrix is written as the vector of its entries, row by row, and a precision as the matrix over
these entries that it is: no sides, no batches, no joint spaces, no Cholesky, no expanded squares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def operator(update: Tensor, precision: str, side: str, curvature: Tensor | None) -> Tensor:
    """P_i as a matrix over the entries of an update, row by row: (O·I, O·I)."""
    rows, columns = (torch.eye(size, dtype=torch.float64) for size in update.shape)
    if precision == "identity":
        return torch.kron(rows, columns)
    if precision == "diagonal":
        return torch.diag(curvature.double().flatten())
    if precision == "gram" and side == "output":
        return torch.kron(update @ update.T, columns)
    return torch.kron(rows, update.T @ update if precision == "gram" else curvature.double())


@dataclass(frozen=True)
class Product:
    """Any product of experts, over the entries of a matrix or of a piece of one.

    λ and γ are fixed before the first step. Experts of no size have no scale, so no heavy tail.
    """

    updates: Sequence[Tensor]  # A_i (N,)
    operators: Sequence[Tensor]  # P_i (N, N)
    says: Sequence[float]  # w_i
    tail: str = "gaussian"  # cauchy, student_t
    ridge: float = 0.01
    ridge_mode: str = "relative"
    scale: str = "equivariant"
    epsilon: float = 0.1
    nu: float | str = 4.0

    def q(self, merged: Tensor) -> list[float]:
        """Disagreement with each expert."""
        misses = [merged - a for a in self.updates]
        return [float(r @ p @ r) for r, p in zip(misses, self.operators, strict=True)]

    @cached_property
    def sizes(self) -> list[float]:
        """q_i(0)."""
        return self.q(torch.zeros_like(self.updates[0]))

    @cached_property
    def relative(self) -> list[tuple[float, float]]:
        """(w_i, u_i = q_i / q_i(0)) at the Gaussian mode of equal footing, ridge 1e-2."""
        weights = [w / s if s else 0.0 for w, s in zip(self.says, self.sizes, strict=True)]
        merged = self.mode(weights, 1e-2 * self.mean_diagonal(weights) or 1.0)
        each = zip(self.says, self.q(merged), self.sizes, strict=True)
        return [(w, q / s) for w, q, s in each if w and s]

    @cached_property
    def degrees(self) -> float:
        """ν: 1 for Cauchy; the likeliest of a grid where it is to be estimated."""
        if self.tail == "cauchy":
            return 1.0
        if self.nu != "estimated":
            return float(self.nu)
        grid = [10 ** (k / 10) for k in range(21)]
        return max(grid, key=lambda nu: likelihood(self.relative, nu, likeliest(self.relative, nu)))

    @cached_property
    def scales(self) -> list[float]:
        """γ_i²."""
        if self.scale == "paper":
            sizes = [float(a.square().sum()) for a in self.updates]
        else:
            unit = likeliest(self.relative, self.degrees) if self.scale == "estimated" else 1.0
            sizes = [unit * size for size in self.sizes]
        known = [size for w, size in zip(self.says, sizes, strict=True) if w and size]
        usual = sum(known) / len(known) if known else 1.0  # of one that wants no change
        each = zip(self.says, sizes, strict=True)
        return [self.epsilon * (size if w and size else usual) for w, size in each]

    def energies(self, merged: Tensor) -> list[float]:
        """E_i(M)."""
        if self.tail == "gaussian":
            return [0.5 * w * q for w, q in zip(self.says, self.q(merged), strict=True)]
        nu, found = self.degrees, []
        for w, g, q in zip(self.says, self.scales, self.q(merged), strict=True):
            student = (nu + 1) * math.log1p(q / (nu * g)) if g else 0.0
            cauchy = math.log(g + q) if g else 0.0
            found.append(0.5 * w * (cauchy if self.tail == "cauchy" else student))
        return found

    def energy(self, merged: Tensor) -> float:
        """Σ E_i(M) + λ/2 ||M||²."""
        return sum(self.energies(merged)) + 0.5 * self.prior * float(merged @ merged)

    def weights(self, merged: Tensor) -> list[float]:
        """α_i = 2 dE_i/dq_i."""
        if self.tail == "gaussian":
            return list(self.says)
        nu, found = self.degrees, []
        for w, g, q in zip(self.says, self.scales, self.q(merged), strict=True):
            student = (nu + 1) / (nu * g + q) if g else 0.0
            found.append(w * (1 / (g + q) if g and self.tail == "cauchy" else student))
        return found

    def mean_diagonal(self, weights: Sequence[float]) -> float:
        """Of Σ w_i P_i."""
        traces = [float(p.trace()) for p in self.operators]
        return sum(w * t for w, t in zip(weights, traces, strict=True)) / len(self.updates[0])

    @cached_property
    def origin(self) -> list[float]:
        """α_i at M = 0."""
        return self.weights(torch.zeros_like(self.updates[0]))

    @cached_property
    def prior(self) -> float:
        """λ."""
        if self.ridge_mode == "absolute":
            return self.ridge
        return self.ridge * self.mean_diagonal(self.origin)

    def system(self, weights: Sequence[float], prior: float) -> tuple[Tensor, Tensor]:
        """H = Σ α_i P_i + λ I and b = Σ α_i P_i A_i."""
        matrix = prior * torch.eye(len(self.updates[0]), dtype=torch.float64)
        right = torch.zeros_like(self.updates[0])
        for weight, p, a in zip(weights, self.operators, self.updates, strict=True):
            matrix, right = matrix + weight * p, right + weight * p @ a
        return matrix, right

    def mode(self, weights: Sequence[float], prior: float) -> Tensor:
        """The M with H M = b."""
        return torch.linalg.solve(*self.system(weights, prior))

    def miss(self, merged: Tensor) -> float:
        """||H M - b|| / ||b|| with the weights that M asks for."""
        matrix, right = self.system(self.weights(merged), self.prior)
        return float((matrix @ merged - right).norm() / (right.norm() or 1.0))

    def start(self) -> Tensor:
        """The Gaussian mode with equal weights."""
        voters = [float(w > 0) for w in self.origin]
        if not any(voters):
            return torch.zeros_like(self.updates[0])
        if self.tail == "gaussian":
            return self.mode(self.origin, self.prior)
        unit = sum(self.origin) / sum(voters) if self.ridge_mode == "relative" else 1.0
        return self.mode([unit * v for v in voters], self.prior)

    def solve(self, steps: int = 2000) -> Tensor:
        """Plain reweighting until nothing moves."""
        merged = self.start()
        for _ in range(steps if self.tail != "gaussian" and any(self.origin) else 0):
            before, merged = merged, self.mode(self.weights(merged), self.prior)
            if (merged - before).norm() <= 1e-12 * merged.norm():
                break
        return merged


def product(
    experts: Sequence[Tensor],
    weights: Sequence[float],
    precision: str = "gram",
    side: str = "input",
    curvatures: Sequence[Tensor | None] | None = None,
    *,
    entries: Tensor | None = None,
    **options: object,
) -> Product:
    """The product over a matrix, or over the `entries` (a mask) that are a piece of it.

    A piece has energies and weights of its own, but the precisions of the whole.
    """
    chosen = slice(None) if entries is None else entries.flatten()
    givens = curvatures if curvatures is not None else [None] * len(experts)
    forms = [operator(a, precision, side, c) for a, c in zip(experts, givens, strict=True)]
    if options.pop("balance", "none") == "norm":
        sizes = [float(a.double().flatten()[chosen].square().sum()) for a in experts]
        weights = [w / s if s else 0.0 for w, s in zip(weights, sizes, strict=True)]
    return Product(
        [a.double().flatten()[chosen] for a in experts],
        [p[chosen][:, chosen] for p in forms],
        weights,
        **options,
    )


def slope(relative: Sequence[tuple[float, float]], nu: float, s: float) -> float:
    """Twice the derivative of the log-likelihood by log s."""
    return sum(w * ((nu + 1) * u / (nu * s + u) - 1) for w, u in relative)


def likelihood(relative: Sequence[tuple[float, float]], nu: float, s: float) -> float:
    """Log-likelihood of residuals √u under a Student-t of scale √s."""
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * s)
    return sum(w * (constant - (nu + 1) / 2 * math.log1p(u / (nu * s))) for w, u in relative)


def likeliest(relative: Sequence[tuple[float, float]], nu: float) -> float:
    """The s of greatest likelihood, 1e-6 at least: scan, then narrow what brackets the top."""
    low, high = 1e-6, 1e4 * max([u for _, u in relative] or [1.0]) + 1e-2
    if not relative or slope(relative, nu, low) <= 0:
        return low
    for _ in range(40):
        points = [low * (high / low) ** (k / 8) for k in range(9)]
        last = max(k for k in range(8) if slope(relative, nu, points[k]) > 0)
        low, high = points[last], points[last + 1]
    return low
