"""Residual densities on logarithmic axes, with what was fitted to them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.report.figures.style import SMALL, Theme, panels, plain

FAMILIES = {
    "gaussian": "Gaussian",
    "student_t": "Student-t",
    "cauchy": "Cauchy",
    "weibull": "Weibull",
}
COLOURS = {"gaussian": 0, "student_t": 2, "cauchy": 1, "weibull": 3}  # of the theme
DASHES = {"gaussian": (4, 2), "student_t": (), "cauchy": (1, 1.2), "weibull": (5, 1.5, 1, 1.5)}
MARGIN = 5.0  # times the densities that were seen
SMALLEST = 1e-2  # of the scale: what is smaller tells nothing of tails


def densities(residuals: Mapping[str, Mapping[str, Any]], theme: Theme) -> Figure:
    """A panel a merge: dots seen, lines fitted; the best of them is the thick one."""
    figure, axes = panels(len(residuals), 2.1, sharex=True, sharey=True)
    seen = np.concatenate([_seen(found)[1] for found in residuals.values()])
    for axis, (label, found) in zip(axes, residuals.items(), strict=True):
        _panel(axis, found, theme)
        axis.set_title(plain(label), pad=3)
        axis.grid()
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].set_ylim(seen.min() / MARGIN, seen.max() * MARGIN)
    axes[0].set_xlim(left=SMALLEST)
    figure.supxlabel("size of a residual entry, in units of its matrix's scale", fontsize=9)
    figure.supylabel("density", fontsize=9)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, columnspacing=1.2)
    return figure


def tail_of(found: Mapping[str, Any]) -> float | None:
    """The tail index of a matrix or of all; None where nothing could be told."""
    index = found["tail_index"]
    return None if index is None else float(index["estimate"])


def _seen(found: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the bins, and the densities there, of those bins that hold something."""
    density = np.asarray(found["histogram"]["density"], float)
    return _centres(found)[density > 0], density[density > 0]


def _centres(found: Mapping[str, Any]) -> np.ndarray:
    """Of the bins, whose edges are spaced in logarithms."""
    edges = np.asarray(found["histogram"]["edges"], float)
    return np.sqrt(edges[1:] * edges[:-1])


def _panel(axis: Axes, found: Mapping[str, Any], theme: Theme) -> None:
    axis.plot(*_seen(found), "o", color=theme.faint, markersize=2.4, label="residuals", zorder=1)
    centres = _centres(found)
    for family, name in FAMILIES.items():
        best = family == found["best"]
        axis.plot(
            centres,
            np.asarray(found["fits"][family]["density"], float),
            color=theme.colours[COLOURS[family]],
            linewidth=2.0 if best else 1.2,
            dashes=DASHES[family],
            label=name,
        )
    words, tail = f"best: {FAMILIES[found['best']]}\nν = {found['nu']:.2g}", tail_of(found)
    words += "" if tail is None else f"\ntail index {tail:.2g}"
    axis.text(0.04, 0.05, words, transform=axis.transAxes, fontsize=SMALL, va="bottom")
