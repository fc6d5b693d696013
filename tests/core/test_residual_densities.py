"""Fits of simulated residuals: the true density wins, and scipy finds the same parameters."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from poemerge.residuals.densities import DENSITIES, Cauchy, Gaussian, StudentT, Weibull, root
from poemerge.residuals.summary import Fits
from poemerge.residuals.tail import SMALLEST, Histogram, tail_index
from poemerge.residuals.verdict import BODY, best_of, sentence

COUNT = 20_000
TRUTH: dict[str, Any] = {
    "gaussian": stats.norm(scale=3e-7),
    "cauchy": stats.cauchy(scale=20.0),
    "student_t": stats.t(3, scale=0.02),
    "weibull": stats.dweibull(0.6, scale=5.0),
}
# Each density as scipy has it, with the parameters of ours.
TWINS = {
    "gaussian": lambda p: stats.norm(scale=p["scale"]),
    "cauchy": lambda p: stats.cauchy(scale=p["scale"]),
    "student_t": lambda p: stats.t(p["nu"], scale=p["scale"]),
    "weibull": lambda p: stats.dweibull(p["shape"], scale=p["scale"]),
}


def simulate(distribution: Any, count: int = COUNT) -> np.ndarray:
    return distribution.rvs(size=count, random_state=np.random.default_rng(7))


def sizes(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.abs(values))


@pytest.mark.parametrize("name", TRUTH)
def test_the_true_density_wins(name: str) -> None:
    fits = Fits.of(sizes(simulate(TRUTH[name])))
    assert best_of(fits.likelihoods) == name
    truth = TRUTH[name].logpdf(simulate(TRUTH[name])).mean()
    assert fits.likelihoods[name] == pytest.approx(truth, abs=2e-3)


@pytest.mark.parametrize("name", TRUTH)
def test_parameters_are_those_of_scipy(name: str) -> None:
    values = simulate(TRUTH[name])
    given = sizes(values)
    assert Gaussian.fit(given).scale == pytest.approx(stats.norm.fit(values, floc=0)[1], rel=1e-9)
    _, scale = stats.cauchy.fit(values, floc=0)
    assert Cauchy.fit(given).scale == pytest.approx(scale, rel=1e-3)
    shape, _, scale = stats.weibull_min.fit(np.abs(values), floc=0)
    weibull = Weibull.fit(given)
    assert (weibull.shape, weibull.scale) == pytest.approx((shape, scale), rel=1e-3)
    if name != "gaussian":  # whose ν has no end
        nu, _, scale = stats.t.fit(values, floc=0)
        student = StudentT.fit(given)
        assert (student.nu, student.scale) == pytest.approx((nu, scale), rel=1e-3)


@pytest.mark.parametrize("name", TRUTH)
def test_no_other_parameters_are_likelier(name: str) -> None:
    """Steps of a per cent in any parameter, from every fit to every sample, lower it."""
    values = simulate(TRUTH[name])
    for kind, fit in Fits.of(sizes(values)).densities.items():
        found = vars(fit)
        best = TWINS[kind](found).logpdf(values).mean()
        for parameter, value in found.items():
            if (kind, name, parameter) == ("student_t", "gaussian", "nu"):
                continue  # flat there: the end of its range
            for factor in (0.99, 1.01):
                moved = TWINS[kind](found | {parameter: factor * value})
                assert moved.logpdf(values).mean() < best


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_those_of_scipy(name: str) -> None:
    fit = DENSITIES[name].fit(sizes(simulate(TRUTH["student_t"], 500)))
    values = np.geomspace(1e-6, 10, 50)
    expected = TWINS[name](vars(fit)).logpdf(values)
    assert fit.log_density(torch.from_numpy(values)).numpy() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("nu", [0.3, 1.0, 2.0, 8.0, 30.0])
def test_degrees_of_freedom_are_recovered(nu: float) -> None:
    fit = StudentT.fit(sizes(simulate(stats.t(nu, scale=4.0), 100_000)))
    assert fit.nu == pytest.approx(nu, rel=0.03 if nu < 10 else 0.25)
    assert fit.scale == pytest.approx(4.0, rel=0.03)


def test_gaussian_residuals_reach_the_end_of_the_degrees() -> None:
    quantiles = stats.norm.ppf((np.arange(COUNT) + 0.5) / COUNT)  # no tail by chance
    assert StudentT.fit(sizes(quantiles)).nu == pytest.approx(200.0)


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_units_change_scales_alone(unit: float) -> None:
    values = sizes(simulate(TRUTH["student_t"]))
    one, other = Fits.of(values), Fits.of(values * unit)
    for name, fit in one.densities.items():
        expected = vars(fit) | {"scale": vars(fit)["scale"] * unit}
        assert vars(other.densities[name]) == pytest.approx(expected, rel=1e-6)
        shifted = one.likelihoods[name] - math.log(unit)
        assert other.likelihoods[name] == pytest.approx(shifted, abs=1e-9)
    assert other.nu == pytest.approx(one.nu, rel=1e-6)
    assert best_of(other.likelihoods) == best_of(one.likelihoods)


def test_equal_residuals_are_fitted() -> None:
    fits = Fits.of(torch.full((200,), 0.25, dtype=torch.float64))
    assert vars(fits.densities["gaussian"]) == {"scale": 0.25}
    assert all(math.isfinite(value) for value in fits.likelihoods.values())
    assert tail_index(torch.ones(200, dtype=torch.float64)) is None


@pytest.mark.parametrize("alpha", [0.7, 1.0, 2.5])
def test_hill_finds_the_index_of_a_power_law(alpha: float) -> None:
    found = tail_index(sizes(simulate(stats.pareto(alpha), 50_000)).sort().values)
    assert found is not None
    assert found["entries"] == 2500
    assert found["standard_error"] == found["estimate"] / 50
    assert abs(found["estimate"] - alpha) < 3 * found["standard_error"]


def test_hill_finds_the_degrees_of_a_student_t() -> None:
    for nu in (1, 2):
        found = tail_index(sizes(simulate(stats.t(nu), 100_000)).sort().values)
        assert found is not None
        assert found["estimate"] == pytest.approx(nu, rel=0.15)


def test_a_histogram_is_a_density() -> None:
    ordered = sizes(simulate(stats.cauchy())).sort().values
    histogram = Histogram.of(ordered)
    widths = histogram.edges.diff()
    assert float((histogram.density * widths).sum()) == pytest.approx(1 - SMALLEST)
    ratios = histogram.edges[1:] / histogram.edges[:-1]
    assert ratios.numpy() == pytest.approx(float(ratios[0]))
    for index in (0, 20, 59):
        low, high = histogram.edges[index], histogram.edges[index + 1]
        inside = (ordered >= low) & ((ordered < high) | (index == 59))
        expected = float(inside.sum()) / COUNT
        assert float(histogram.density[index] * widths[index]) == pytest.approx(expected)
    middle = slice(15, 40)
    truth = 2 * stats.cauchy.pdf(histogram.centres[middle])
    assert histogram.density[middle].numpy() == pytest.approx(truth, rel=0.3)


def test_gaussian_beats_cauchy_from_four_degrees_on() -> None:
    """What the words of the verdict rest on."""
    for nu, ahead in ((BODY - 1.5, "cauchy"), (BODY, "gaussian")):
        fits = Fits.of(sizes(stats.t.ppf((np.arange(COUNT) + 0.5) / COUNT, nu)))
        assert max(("gaussian", "cauchy"), key=fits.likelihoods.__getitem__) == ahead


def test_the_root_is_found_or_the_nearer_end() -> None:
    assert root(lambda x: 2 - x**3, 0.0, 10.0) == pytest.approx(2 ** (1 / 3), abs=1e-9)
    assert root(lambda x: -1 - x, 0.0, 10.0) == 0.0
    assert root(lambda x: 11 - x, 0.0, 10.0) == 10.0


def test_a_density_must_beat_the_simpler_ones_by_the_margin() -> None:
    flat = {"gaussian": -2.0, "cauchy": -2.3, "student_t": -1.995, "weibull": -1.995}
    assert best_of(flat) == "gaussian"
    assert best_of(flat | {"student_t": -1.98}) == "student_t"
    assert best_of(flat | {"student_t": -1.98, "weibull": -1.96}) == "weibull"


VERDICTS = {
    (-2.41, -2.05, -2.0, -2.2, 2.31): """
        Student-t with 2.3 degrees of freedom describes these residuals best (0.41 nats an entry
        above Gaussian, 0.05 above Cauchy): the tails are heavy, nearer Cauchy than Gaussian;""",
    (-2.04, -2.15, -2.0, -2.2, 5.0): """
        Student-t with 5.0 degrees of freedom describes these residuals best (0.04 nats an entry
        above Gaussian, 0.15 above Cauchy): the tails are heavier than Gaussian, yet nearer it than
        Cauchy;""",
    (-2.32, -2.15, -2.0, -2.2, 7.0): """
        Student-t with 7.0 degrees of freedom describes these residuals best (0.32 nats an entry
        above Gaussian, 0.15 above Cauchy): most residuals are near Gaussian, and a few are far
        larger;""",
    (-2.0, -2.2, -1.999, -2.1, 88.0): """
        Gaussian describes these residuals best (0.20 nats an entry above Cauchy; Student-t, with
        88.0 degrees of freedom, gains only 0.001): the tails are light;""",
    (-9.0, -2.0, -1.997, -2.1, 1.08): """
        Cauchy describes these residuals best (7.00 nats an entry above Gaussian; Student-t, with
        1.1 degrees of freedom, gains only 0.003): the tails are as heavy as Cauchy's;""",
}


@pytest.mark.parametrize("given", VERDICTS)
def test_the_verdict_in_words(given: tuple[float, ...]) -> None:
    *means, nu = given
    likelihoods = dict(zip(DENSITIES, means, strict=True))
    expected = " ".join(VERDICTS[given].split()) + " so it is in 7 of 9 matrices alone"
    assert sentence(likelihoods, nu, 7, 9, 0) == expected + "."
    assert sentence(likelihoods, nu, 7, 9, 2) == expected + " (2 more are left out)."
    better = likelihoods | {"weibull": -1.97}
    weibull = "; Weibull, which no expert has, fits 0.03 nats better still."
    assert sentence(better, nu, 7, 9, 0) == expected + weibull
