"""What varies over the depth of the model: one panel a module, layers in order along the x axis."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.report.figures.style import MARKERS, SMALL, Theme, log_scale, panels, plain
from tasks.report.merges import Merge
from tasks.report.numbers import Numbers

Values = Mapping[str, float]  # tensor → number
Line = tuple[list[int], list[float]]  # layers, values
HEIGHT = 1.25  # inches of a panel


def lines(
    numbers: Numbers,
    theme: Theme,
    *,
    series: Mapping[str, Values],
    label: str,
    band: Sequence[Values] = (),
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """A line for each merge in each module's panel, on a logarithmic axis.

    Args:
        numbers: for the places of the matrices and the colours of the merges.
        theme: light or dark.
        series: merge → matrix → positive number; one of them at least stands in a layer.
        label: of the y axis, with its unit.
        band: what the grey area spans, one for each expert.
        marks: levels to name.
    """
    colours = theme.of(list(numbers.merges))
    modules = _modules(numbers, set().union(*series.values()))
    figure, axes = panels(len(modules), HEIGHT, sharex=True, sharey=True)
    for axis, (module, names) in zip(axes, modules.items(), strict=True):
        for index, (name, values) in enumerate(series.items()):
            layers, heights = _line(numbers, values, names)
            axis.plot(
                layers,
                heights,
                color=colours[name],
                label=plain(name),
                linewidth=1.3,
                marker=MARKERS[index % len(MARKERS)],
                markersize=3.5,
                markevery=(index, max(1, len(layers) // 4)),  # few, and not above one another
            )
        _fill(axis, [_line(numbers, each, names) for each in band], theme)
        for level in (marks or {}).values():
            axis.axhline(level, color=theme.faint, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        _dress(axis, module)
        axis.grid()
    for words, level in (marks or {}).items():
        _name_level(axes[0], words, level)
    log_scale(axes[0])  # shared by all
    figure.supylabel(label, fontsize=9)
    figure.supxlabel("layer", fontsize=9)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, columnspacing=1.2)
    return figure


def shares(numbers: Numbers, merge: Merge, theme: Theme) -> Figure:
    """Experts × layers, a panel for each module: how much of the solve each expert decides."""
    weights = {matrix.name: matrix.weights for matrix in merge.solved}
    modules = _modules(numbers, set(weights))
    figure, axes = panels(len(modules), 0.4 + 0.14 * len(merge.experts), sharey=True)
    top = max(max(by.values()) for by in weights.values())
    for axis, (module, names) in zip(axes, modules.items(), strict=True):
        rows = [{n: weights[n].get(e, np.nan) for n in names} for e in merge.experts]
        means = [_means(numbers, row) for row in rows]
        cells = np.array([values for _, values in means])
        edges = _edges(means[0][0])
        sides = np.arange(len(merge.experts) + 1) - 0.5
        image = axis.pcolormesh(edges, sides, cells, cmap=theme.sequential, vmin=0, vmax=top)
        axis.set_yticks(range(len(merge.experts)), map(plain, merge.experts))
        axis.tick_params(axis="y", length=0)
        axis.spines[:].set_visible(False)
        _dress(axis, module)
    axes[0].invert_yaxis()  # shared by all
    figure.supxlabel("layer", fontsize=9)
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.6, aspect=40)
    bar.outline.set_visible(False)
    bar.set_label(f"share of the weight (equal shares: {1 / len(merge.experts):.2f})")
    return figure


def _modules(numbers: Numbers, names: set[str]) -> dict[str, list[str]]:
    """Module → its matrices among `names`, layer by layer."""
    modules: dict[str, list[str]] = {}
    for name, place in numbers.places.items():
        if name in names:
            modules.setdefault(place.module, []).append(name)
    return modules


def _line(numbers: Numbers, values: Values, names: Sequence[str]) -> Line:
    """What is positive, layer by layer."""
    return _means(numbers, {name: values[name] for name in names if values.get(name, 0) > 0})


def _means(numbers: Numbers, values: Values) -> Line:
    """Layer by layer; the mean where one has several matrices of the kind."""
    at: dict[int, list[float]] = {}
    for name, value in values.items():
        at.setdefault(numbers.places[name].layer, []).append(value)
    return list(at), [fmean(heights) for heights in at.values()]


def _fill(axis: Axes, band: Sequence[Line], theme: Theme) -> None:
    at: dict[int, list[float]] = {}
    for layers, heights in band:
        for layer, height in zip(layers, heights, strict=True):
            at.setdefault(layer, []).append(height)
    if at:
        where = sorted(at)
        low, high = [min(at[layer]) for layer in where], [max(at[layer]) for layer in where]
        axis.fill_between(where, low, high, color=theme.grid, linewidth=0, label="experts, range")


def _edges(layers: Sequence[int]) -> np.ndarray:
    middle = np.asarray(layers, float)
    if len(middle) == 1:
        return np.array([middle[0] - 0.5, middle[0] + 0.5])
    between = (middle[1:] + middle[:-1]) / 2
    return np.array([middle[0] - 0.5, *between, middle[-1] + 0.5])


def _name_level(axis: Axes, words: str, level: float) -> None:
    where = axis.get_yaxis_transform()
    axis.annotate(
        words, (0, level), (0, 2), xycoords=where, textcoords="offset points", fontsize=SMALL
    )


def _dress(axis: Axes, module: str) -> None:
    axis.set_title(plain(module), pad=3)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
