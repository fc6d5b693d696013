"""What a run ends with in the terminal: the leaderboard, and where everything lies."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from rich.table import Table

from flows.console import board_table, console
from poemerge.redaction import redact
from tasks.register.leaderboard import Leaderboard, Row
from tasks.tracking import DATABASE, VARIABLE


def show_outcome(outcome: Mapping[str, Any]) -> None:
    """The leaderboard of a run and where everything lies."""
    if outcome["register"] is None:
        for label, folder in outcome["merges"].items():
            console.print(f"{label}: {folder}")
        return
    register = Path(outcome["register"])
    board = Leaderboard.read(register / "leaderboard.json")
    entry = json.loads((register / "registration.json").read_text(encoding="utf-8"))
    console.print(leaderboard_table(board, {k: Path(v) for k, v in outcome["logs"].items()}))
    made = outcome["made"]
    console.print(f"{len(made)} steps done" if made else "Everything was up to date.")
    lossy = " (dequantised: its scores are below the original's)"
    rows = {
        "base": outcome["base"] + lossy * outcome["base"].endswith(".gguf"),
        "best": f"{entry['candidate']}, registered as {entry['name']}",
        "model": outcome["merges"][entry["candidate"]],
        "leaderboard": str(register / "leaderboard.json"),
        "report": str(Path(outcome["report"], "index.html")),
        **_pages(),
        "artifacts": "dvc status; dvc dag; dvc push",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    console.print(table)


def _pages() -> dict[str, str]:
    """Where to see more in a browser: at the servers that are named, or at one to be started."""
    runs = "prefect server start, then http://127.0.0.1:4200"
    if PREFECT_API_URL.value():
        runs = redact(PREFECT_UI_URL.value() or "")
    return {"registry": _registry(), "runs": runs}


def _registry() -> str:
    named = redact(os.environ.get(VARIABLE, ""))
    if named.startswith(("http://", "https://")):
        return named
    return f"mlflow ui --backend-store-uri {named or f'sqlite:///{DATABASE}'}"


def leaderboard_table(board: Leaderboard, logs: Mapping[str, Path]) -> Table:
    """Rows methods, columns tasks (per cent), then means, seconds and peak memory."""
    table = board_table(
        "Test scores, per cent",
        "experts: each on its own task; norm: mean of score / expert's score; val: mean on "
        "validation, which chooses; s and MB: of the merge",
    )
    table.add_column("candidate", no_wrap=True)
    for column in (*board.tasks, "mean", "norm", "val", "s", "MB"):
        table.add_column(column, justify="right", overflow="fold")
    for row in board.of("base"):
        table.add_row(*_cells(row, board), "", "")
    table.add_row(*_expert_cells(board))
    table.add_section()
    for row in board.of("merge"):
        style = "bold green" if row.label == board.best.label else ""
        table.add_row(*_cells(row, board), *_cost(logs.get(row.label)), style=style)
    return table


def _cells(row: Row, board: Leaderboard) -> list[str]:
    scores = [_number(row.score(task)) for task in board.tasks]
    means = (row.mean.get("test"), row.normalised.get("test"), row.mean.get("validation"))
    return [row.label, *scores, *(_number(mean) for mean in means)]


def _expert_cells(board: Leaderboard) -> list[str]:
    experts = {row.label: row.score(row.label) for row in board.of("expert")}
    return ["experts", *(_number(experts.get(task)) for task in board.tasks), *[""] * 5]


def _cost(log: Path | None) -> tuple[str, str]:
    if log is None or not log.exists():
        return "", ""
    cost = json.loads(log.read_text(encoding="utf-8"))
    return f"{cost['seconds']:.0f}", f"{cost['peak_bytes'] / 1e6:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
