"""What Prefect shows of a run: what moved, how far it is, the leaderboard, the report.

All of it is for people. A server that takes none of it stops no merge.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from platform import node
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.changes import Standing
from tasks.register.leaderboard import Leaderboard, Row
from tasks.report import PAGE
from tasks.report.logged import address

EVERY = 2.0  # seconds between two updates of a step
MOVED = "| what | was | is |\n| --- | --- | --- |\n"

logger = logging.getLogger(__name__)


def show_moved(standing: Standing) -> None:
    """Why there is something to do."""
    rows = "".join(f"| {c.what} | {c.was or 'new'} | {c.now or 'gone'} |\n" for c in standing.moved)
    with _forgiving():
        said = MOVED + rows if rows else str(standing)
        create_markdown_artifact(said, key="moved", description="Why there was something to do")


def show_outcome(outcome: Mapping[str, Any], experiment: str) -> None:
    """The leaderboard as a table, and where the page of the report is, if there are any.

    Args:
        outcome: of a run; see `Places.outcome`.
        experiment: of the run in MLflow.
    """
    if outcome["register"] is None:
        return
    with _forgiving():
        board = Leaderboard.read(Path(outcome["register"]) / "leaderboard.json")
        table = [_cells(row, board) for row in board.rows]
        create_table_artifact(table, key="leaderboard", description=f"Best: {board.best.label}")
        _show_report(Path(outcome["report"], PAGE), address(Path(outcome["register"]), experiment))


def _show_report(page: Path, folder: str | None) -> None:
    """A link to MLflow's server; without one, a path, for browsers follow no link to a file."""
    here = f"On {node()}: `{page.resolve()}`"
    said = f"[the page, in MLflow]({folder}/{PAGE})" if folder else here
    create_markdown_artifact(said, key="report", description="Report of the run")


def ending(outcome: Mapping[str, Any]) -> str:
    """What came of a run, for the message of its last state."""
    said = f"{len(outcome['made'])} steps done"
    if outcome["register"] is not None:
        board = Leaderboard.read(Path(outcome["register"]) / "leaderboard.json")
        said += f"; best: {board.best.label}"
    if promotion := outcome["promotion"]:
        said += f"; {promotion['kind']} of version {promotion['version']}"
    return said


class Steps:
    """Watches steps, and keeps a progress artifact for each of them."""

    def __init__(self) -> None:
        self._known: dict[str, UUID] = {}
        self._next: dict[str, float] = {}  # when to update again, on the clock of time.monotonic
        self._is_away = False
        self._lock = threading.Lock()  # steps may go side by side

    def __call__(self, step: str, unit: str, done: int, total: int) -> None:
        """Pass on how far the step is, now and then and at its end."""
        with self._lock:
            self._pass_on(step, unit, done, total)

    def _pass_on(self, step: str, unit: str, done: int, total: int) -> None:
        if self._is_away or (done < total and time.monotonic() < self._next.get(step, 0.0)):
            return
        self._is_away = True  # unless the server takes this one: nobody waits for it twice
        with _forgiving():
            self._show(step, 100.0 * done / max(1, total), f"{total} {unit}")
            self._is_away = False
        self._next[step] = time.monotonic() + EVERY

    def _show(self, step: str, percent: float, about: str) -> None:
        if step in self._known:
            update_progress_artifact(self._known[step], progress=percent)
        else:
            made = create_progress_artifact(percent, _key(step), about)
            self._known[step] = cast("UUID", made)  # no coroutine: nothing here is async


@contextmanager
def _forgiving() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever the server has against it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("Prefect did not take an artifact (%s); the run goes on without it", reason)


def _key(step: str) -> str:
    """`merge tsv_m` as Prefect takes it."""
    return re.sub("[^a-z0-9]+", "-", step.lower()).strip("-")


def _cells(row: Row, board: Leaderboard) -> dict[str, Any]:
    scores = {task: row.score(task) for task in board.tasks}
    scores |= {"mean": row.mean.get("test"), "normalised": row.normalised.get("test")}
    scores["validation"] = row.mean.get("validation")
    shown = {name: None if score is None else round(score, 4) for name, score in scores.items()}
    return {"candidate": row.label, "kind": row.kind, **shown}
