"""What a sweep shows in the terminal."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from ruamel.yaml import YAML

from flows.console import board_table, console
from flows.overrides import inline
from flows.sweep import BOARD, LOG


def show_sweep(outcome: Mapping[str, Any]) -> None:
    """The leaderboard of a sweep, and the winners' settings as params.yaml takes them."""
    folder = Path(outcome["folder"])
    board = json.loads((folder / BOARD).read_text(encoding="utf-8"))
    seconds = json.loads((folder / LOG).read_text(encoding="utf-8"))
    console.print(sweep_table(board, seconds))
    console.print(snippet(outcome["winners"]), highlight=False)
    console.print(f"[bold]leaderboard[/]  {folder / BOARD}")


def sweep_table(board: Mapping[str, Any], seconds: Mapping[str, float]) -> Table:
    """Rows methods, best on validation first; scores in per cent."""
    table = board_table(
        "The best candidate of each method, per cent",
        "val: mean on validation, which chose; test: mean, 95 % interval; gap: test score "
        "less that of the first row, paired, intervals that hold together in 95 %",
    )
    for column in ("method", "settings"):
        table.add_column(column, overflow="fold")
    for column in ("val", "test", "interval", "gap", "interval", "difference", "tried", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in board["rows"]:
        style = "bold green" if row["label"] == board["best"] else ""
        table.add_row(*_cells(row), f"{seconds[row['label']]:.0f}", style=style)
    return table


def snippet(winners: Mapping[str, Mapping[str, Any]]) -> str:
    """The winners as `merge.methods`, in YAML."""
    entries = {label: inline(settings) for label, settings in winners.items()}
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.dump({"merge": {"methods": entries}}, text)
    return text.getvalue()


def _cells(row: Mapping[str, Any]) -> list[str]:
    settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
    scores = [f"{100 * row['validation']:.1f}", *_interval(row["test"]), *_interval(row["gap"])]
    tried = [f"{count} {state}" for state, count in row["counts"].items() if count]
    return [row["label"], settings, *scores, row["verdict"], ", ".join(tried)]


def _interval(interval: Mapping[str, float] | None) -> tuple[str, str]:
    if interval is None:
        return "", ""
    mean, low, high = (100 * interval[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f}", f"{low:.1f} to {high:.1f}"
