"""The leaderboard as a picture: one row a candidate, one column a task, the score in each cell."""

import numpy as np
from matplotlib.figure import Figure

from tasks.register.leaderboard import Leaderboard


def heatmap(board: Leaderboard) -> Figure:
    """Draw test scores in percent.

    The experts share a row, each in the column of its own task; one scored on all has its own too.
    """
    own = {row.label: row.score(row.label) for row in board.of("expert")}
    lines = {row.label: [row.score(task) for task in board.tasks] for row in board.of("base")}
    if own:
        lines["expert of the task"] = [own.get(task) for task in board.tasks]
    for row in board.of("expert"):
        if "test" in row.mean:
            lines[f"expert {row.label}"] = [row.score(task) for task in board.tasks]
    for row in board.of("merge"):
        label = f"{row.label} ★" if row == board.best else row.label
        lines[label] = [row.score(task) for task in board.tasks]
    means = [_mean(values) for values in lines.values()]
    grid = np.array(
        [[*values, mean] for values, mean in zip(lines.values(), means, strict=True)], dtype=float
    )
    return _draw(100 * grid, list(lines), [*board.tasks, "mean"])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _draw(grid: np.ndarray, labels: list[str], columns: list[str]) -> Figure:
    rows, width = grid.shape
    left = 0.09 * max(map(len, labels))  # inches that the names take
    cell = max(1.05, 0.09 * max(map(len, columns)))
    size = (1.5 + left + cell * width, 1.3 + 0.42 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")  # no pyplot: nothing global
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    names = [name.replace("$", r"\$") for name in columns]  # begins no formula
    axes.set_xticks(range(width), names)
    axes.set_yticks(range(rows), labels)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.axvline(width - 1.5, color="white", linewidth=6)
    for row, column in np.argwhere(np.isfinite(grid)):
        value = grid[row, column]
        ink = "white" if value < 55 else "black"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.9, label="test score (%)")
    return figure
