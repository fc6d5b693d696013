"""Four densities that residuals may follow, fitted by maximum likelihood (docs/residuals.md).

All are symmetric about 0, so that magnitudes |r| are enough to fit them: `sizes` (N,), fp64, not 0.
`log_density` is that of the signed r, in nats: the Weibull density of |r| is halved between the
signs, so that likelihoods compare.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

NU = (0.1, 200.0)  # degrees of freedom that are told apart; above, Student-t is Gaussian
SHAPE = (0.02, 50.0)  # of Weibull; 1 is Laplace's density
SPREAD = 40.0  # of the log squared scale about the median's: no end is ever met
DIGITS = 1e-10  # of the logarithms that are solved for
STEPS = 100


@dataclass(frozen=True)
class Gaussian:
    """p(r) ∝ exp(-r² / 2σ²)."""

    name: ClassVar[str] = "gaussian"
    title: ClassVar[str] = "Gaussian"
    scale: float

    @classmethod
    def fit(cls, sizes: Tensor) -> Self:
        """σ is the root mean square."""
        return cls(float(sizes.square().mean().sqrt()))

    def log_density(self, sizes: Tensor) -> Tensor:
        """Log of p(r)."""
        constant = math.log(self.scale) + 0.5 * math.log(2 * math.pi)
        return -0.5 * (sizes / self.scale).square() - constant


@dataclass(frozen=True)
class StudentT:
    """p(r) ∝ (1 + r² / νs²)^(-(ν + 1) / 2)."""

    name: ClassVar[str] = "student_t"
    title: ClassVar[str] = "Student-t"
    scale: float
    nu: float

    @classmethod
    def fit(cls, sizes: Tensor) -> Self:
        """ν where the likelihood at the scale that is likeliest for it no longer rises.

        Along that scale d lnL / dν = N/2 · (ψ((ν + 1) / 2) - ψ(ν / 2) - mean ln(1 + r² / νs²)).
        """
        unit = sizes.median()
        squares = (sizes / unit).square()

        def slope(log_nu: float) -> float:
            nu = math.exp(log_nu)
            spread = nu * likeliest_square(squares, nu)
            wanted = _digamma((nu + 1) / 2) - _digamma(nu / 2)
            return math.log(wanted / _mean((squares / spread).log1p()))

        nu = math.exp(root(slope, *map(math.log, NU)))
        return cls(float(unit) * math.sqrt(likeliest_square(squares, nu)), nu)

    def log_density(self, sizes: Tensor) -> Tensor:
        """Log of p(r)."""
        nu, half = self.nu, (self.nu + 1) / 2
        constant = math.lgamma(half) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
        ratio = (sizes / self.scale).square() / nu
        return constant - math.log(self.scale) - half * ratio.log1p()


@dataclass(frozen=True)
class Cauchy:
    """p(r) ∝ 1 / (1 + r² / s²): Student-t with ν = 1."""

    name: ClassVar[str] = "cauchy"
    title: ClassVar[str] = "Cauchy"
    scale: float

    @classmethod
    def fit(cls, sizes: Tensor) -> Self:
        """The likeliest scale."""
        unit = sizes.median()
        return cls(float(unit) * math.sqrt(likeliest_square((sizes / unit).square(), nu=1.0)))

    def log_density(self, sizes: Tensor) -> Tensor:
        """Log of p(r)."""
        return StudentT(self.scale, nu=1.0).log_density(sizes)


@dataclass(frozen=True)
class Weibull:
    """p(r) ∝ |r|^(k - 1) exp(-(|r| / s)^k): heavier than Gaussian for k < 2, yet no power law."""

    name: ClassVar[str] = "weibull"
    title: ClassVar[str] = "Weibull"
    scale: float
    shape: float

    @classmethod
    def fit(cls, sizes: Tensor) -> Self:
        """Shape k where 1 / k + mean ln|r| = Σ |r|^k ln|r| / Σ |r|^k; s^k is the mean of |r|^k."""
        logs = sizes.log()
        mean = _mean(logs)
        logs = logs - mean

        def slope(log_shape: float) -> float:
            shape = math.exp(log_shape)
            return 1 / shape - float((logs * shape).softmax(dim=0) @ logs)

        shape = math.exp(root(slope, *map(math.log, SHAPE)))
        moment = float((logs * shape).logsumexp(dim=0)) - math.log(sizes.numel())
        return cls(math.exp(mean + moment / shape), shape)

    def log_density(self, sizes: Tensor) -> Tensor:
        """Log of p(r)."""
        logs = (sizes / self.scale).log()
        constant = math.log(self.shape / (2 * self.scale))
        return constant + (self.shape - 1) * logs - (self.shape * logs).exp()


Density = Gaussian | Cauchy | StudentT | Weibull
DENSITIES: Mapping[str, type[Density]] = {
    density.name: density for density in (Gaussian, Cauchy, StudentT, Weibull)
}


def likeliest_square(squares: Tensor, nu: float) -> float:
    """s² of a Student-t for r² (N,), whose median is 1: (ν + 1) mean(r² / (νs² + r²)) = 1."""

    def slope(log_square: float) -> float:
        return math.log((nu + 1) * _mean(squares / (squares + nu * math.exp(log_square))))

    return math.exp(root(slope, -SPREAD, SPREAD))


def root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, or the end next to it (Illinois: Dowell, Jarratt 1971).

    False position, in which the value at an end that stays twice counts half.
    """
    above, below = falling(low), falling(high)
    if above <= 0 or below >= 0:
        return low if above <= 0 else high
    last = 0.0
    for _ in range(STEPS):
        guess = (low * below - high * above) / (below - above)
        value = falling(guess)
        if abs(value) < DIGITS or high - low < DIGITS:
            break
        if value > 0:
            low, above, below = guess, value, below / 2 if last > 0 else below
        else:
            high, below, above = guess, value, above / 2 if last < 0 else above
        last = value
    return guess


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _digamma(value: float) -> float:
    return float(torch.digamma(torch.tensor(value, dtype=torch.float64)))
