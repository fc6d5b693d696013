"""Bars in the terminal, which live together with the lines of the log."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from flows.console import errors
from tasks.progress import watched_by

COLUMNS = "{task.description}", "{task.fields[unit]}"  # the step, and what it counts


@contextmanager
def bars() -> Iterator[None]:
    """A bar for every step that tells how far it is; without a terminal, lines of news."""
    if not errors.is_terminal:
        yield
        return
    step, unit = map(TextColumn, COLUMNS)
    columns = (step, BarColumn(), MofNCompleteColumn(), unit, TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as shown, watched_by(_Bars(shown)):
        yield


class _Bars:
    """One bar for each step, from its first word to its last."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._known: dict[str, TaskID] = {}

    def __call__(self, step: str, unit: str, done: int, total: int) -> None:
        if step not in self._known:
            self._known[step] = self._shown.add_task(step, total=total, unit=unit)
        self._shown.update(self._known[step], completed=done, total=total)
        if done >= total:
            self._shown.remove_task(self._known.pop(step))
