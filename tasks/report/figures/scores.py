"""How the candidates score: means with intervals, and each task of each merge."""

from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from tasks.report.figures.style import SMALL, Theme, grid_of_cells, new_figure, plain
from tasks.report.numbers import Candidate, Numbers

ROW = 0.3  # inches


def ceiling(numbers: Numbers) -> float | None:
    """Mean of what each task's own expert scores there; None where a task has no expert."""
    own = own_scores(numbers)
    return fmean(own.values()) if own.keys() == set(numbers.tasks) else None


def own_scores(numbers: Numbers) -> dict[str, float]:
    """Task → score of the expert that is named after it."""
    return {e.label: e.scores[e.label] for e in numbers.of("expert")}


def elsewhere(numbers: Numbers) -> tuple[Candidate, ...]:
    """The experts that were scored on all tasks, not on their own alone."""
    return tuple(e for e in numbers.of("expert") if e.scores.keys() == set(numbers.tasks))


def leaderboard(numbers: Numbers, theme: Theme) -> Figure:
    """Dots with intervals, hollow where the best is really ahead."""
    rows = [*numbers.of("merge"), *numbers.of("base")]
    colours = theme.of(list(numbers.merges))
    figure = new_figure(1.0 + ROW * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        _dot(axes, y, row, colours.get(row.label, theme.faint), theme)
    axes.set_yticks(range(len(rows)), [plain(row.label) for row in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("mean test score (%), with 95 % interval")
    _mark_ceiling(axes, ceiling(numbers), theme)
    return figure


def _dot(axes: Axes, y: int, row: Candidate, colour: str, theme: Theme) -> None:
    mean, low, high = (100 * value for value in (row.mean.mean, row.mean.low, row.mean.high))
    hollow = row.behind is not None and row.behind.is_real
    axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    face = theme.paper if hollow else colour
    axes.plot(mean, y, "o", color=colour, markerfacecolor=face, markersize=6.5, markeredgewidth=1.6)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    weight = "bold" if y == 0 else "normal"
    axes.text(1.02, y, f"{mean:.1f}", transform=beside, va="center", weight=weight)


def _mark_ceiling(axes: Axes, value: float | None, theme: Theme) -> None:
    if value is None:
        return
    axes.axvline(100 * value, color=theme.faint, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    above = blended_transform_factory(axes.transData, axes.transAxes)
    words = f"each task's own expert {100 * value:.1f} "
    axes.text(100 * value, 1.01, words, transform=above, ha="right", fontsize=SMALL)


def heatmap(numbers: Numbers, theme: Theme) -> Figure:
    """Scores in the cells, coloured by how far they are from the task's own expert."""
    rows = [*numbers.of("merge"), *numbers.of("base"), *elsewhere(numbers)]
    own = own_scores(numbers)
    scores = np.array([[row.scores[task] for task in numbers.tasks] for row in rows])
    target = np.array([own.get(task, scores[:, i].max()) for i, task in enumerate(numbers.tasks)])
    gaps = 100 * (scores - target)
    reach = max(1.0, float(np.abs(gaps).max()))
    figure = new_figure(1.7 + ROW * (len(rows) + 1))
    axes = figure.subplots()
    shown = np.vstack([np.zeros(len(target)), gaps])
    image = axes.imshow(shown, cmap=theme.diverging, vmin=-reach, vmax=reach, aspect="auto")
    grid_of_cells(axes, ["own expert", *map(_name, rows)], numbers.tasks)
    _write(axes, np.vstack([target, scores]), image.to_rgba(shown), theme)
    axes.axhline(0.5, color=theme.faint, linewidth=1)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, aspect=40)
    bar.outline.set_visible(False)
    if gaps.any():  # where all are as good as their task's expert there is no range to show
        bar.ax.set_xlim(min(0.0, gaps.min()), max(0.0, gaps.max()))
    bar.set_label("points from the task's own expert")
    return figure


def _name(row: Candidate) -> str:
    return f"expert {row.label}" if row.kind == "expert" else row.label


def _write(axes: Axes, values: np.ndarray, colours: np.ndarray, theme: Theme) -> None:
    for (y, x), value in np.ndenumerate(values):
        axes.text(
            x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=SMALL,
            color=theme.ink_on(colours[y, x]),
        )  # fmt: skip
