"""What people see of the library of experts."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from flows.console import board_table, console

if TYPE_CHECKING:
    from tasks.library import Expert

SHORT = 12  # characters of a hash


def show_experts(experts: "Sequence[Expert]", *, as_json: bool) -> None:
    """One row an expert, its newest version."""
    if as_json:
        console.print_json(json.dumps([expert.as_json() for expert in experts]))
    elif experts:
        console.print(experts_table(experts))
    else:
        console.print("The library has no such expert; `poemerge experts add` puts one in.")


def experts_table(experts: "Sequence[Expert]") -> Table:
    """Names, tags, scores in per cent, and what each was fine-tuned from."""
    table = board_table(
        "1 expert" if len(experts) == 1 else f"{len(experts)} experts",
        "score: on its own task, test split, per cent; base: its name, and digest of its weights",
    )
    for column in ("expert", "task", "tags", "base"):
        table.add_column(column, overflow="fold")
    for column in ("digest", "score"):
        table.add_column(column, no_wrap=True, justify="right" if column == "score" else "left")
    for expert in experts:
        tags = " ".join(f"{key}={value}" for key, value in expert.tags.items())
        score = "" if expert.score is None else f"{100 * expert.score:.1f}"
        base = f"{expert.base.rpartition('/')[2]} {expert.base_digest[:SHORT]}"
        table.add_row(expert.uri, expert.task, tags, base, expert.digest[:SHORT], score)
    return table
