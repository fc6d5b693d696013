"""How the solves went, and how alike the experts are."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.report.figures.style import SMALL, Theme, grid_of_cells, new_figure, panels, plain
from tasks.report.numbers import Numbers

FLOOR = 1e-12  # of the whole fall: rounding
LOUD = 0.25  # cosine that gets the full colour, if none is larger


def remaining(energies: Sequence[float]) -> np.ndarray:
    """What is left of the fall of the energy before each step, as a part of all of it."""
    values = np.asarray(energies, float)
    fall = values[0] - values[-1]
    return np.maximum((values - values[-1]) / fall, FLOOR) if fall > 0 else np.ones(1)


def energy(numbers: Numbers, theme: Theme) -> Figure:
    """A thin line a matrix: energy above its end, on a logarithmic axis."""
    merges = [merge for merge in numbers.ranked if merge.is_reweighted]
    colours = theme.of(list(numbers.merges))
    figure, axes = panels(len(merges), 1.8, sharex=True, sharey=True)
    for axis, merge in zip(axes, merges, strict=True):
        curves = [
            remaining(matrix.certificate["energies"])
            for matrix in merge.solved
            if matrix.certificate["steps"]
        ]
        opacity = max(0.04, min(0.6, 8 / len(curves)))
        for curve in curves:
            axis.plot(curve, color=colours[merge.label], linewidth=1, alpha=opacity)
        axis.set_title(plain(merge.label), pad=3)
        axis.grid()
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].set_yscale("log")
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("energy above its end\n(part of the whole fall)", fontsize=9)
    return figure


def cosines(matrix: Sequence[Sequence[float]], names: Sequence[str], theme: Theme) -> Figure:
    """Experts × experts; the diagonal, which is 1, is left out of the colours."""
    values = np.array(matrix, float)
    np.fill_diagonal(values, np.nan)
    reach = max(LOUD, float(np.nanmax(np.abs(values), initial=0.0)))
    figure = new_figure(1.9 + 0.3 * len(names))
    axes = figure.subplots()
    image = axes.imshow(values, cmap=theme.diverging, vmin=-reach, vmax=reach, aspect="auto")
    grid_of_cells(axes, names, names)
    colours = image.to_rgba(values)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = theme.ink_on(colours[y, x])
            axes.text(x, y, f"{value:z.2f}", ha="center", va="center", fontsize=SMALL, color=ink)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, aspect=40)
    bar.outline.set_visible(False)
    bar.set_label("cosine of two task vectors")
    return figure
