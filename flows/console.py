"""What people see in the terminal: log lines, progress, tables."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from poemerge.extracting.report import ExtractReport
    from poemerge.merging.groups import Group
    from poemerge.merging.plan import Plan
    from poemerge.method import Method
    from poemerge.report import MergeReport

FILE_WIDTH = 160  # columns, where no terminal says how wide it is
console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
errors = Console(stderr=True)  # one for lines and bars, or they would write over each other
OURS = ("poemerge", "tasks", "flows")


def start_logging() -> None:
    """Show our own log lines, warnings in colour; leave other libraries to their own settings."""
    handler = RichHandler(
        console=errors, show_path=False, show_level=False, omit_repeated_times=False
    )
    logging.raiseExceptions = False  # a line that a server did not take is no matter for people
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


@contextmanager
def tensor_progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over tensors, on stderr."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """A sign of life on stderr, where a terminal shows it."""
    with Console(stderr=True).status(doing):
        yield


def board_table(title: str, caption: str | None = None) -> Table:
    """An empty table in the look of all leaderboards."""
    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )


def show_report(report: "MergeReport", out: Path | str, samples: int = 0) -> None:
    """One line on what was made, one on samples if there are any; warnings were logged."""
    rules = ", ".join(f"{count} {rule}" for rule, count in report.rules.items())
    console.print(f"{out}: {len(report.experts)} experts merged by {report.method} ({rules})")
    if samples:
        console.print(f"{out}-samples: {samples} draws from the posterior")


def show_extraction(report: "ExtractReport", out: Path) -> None:
    """One line on what was made and what it misses; warnings were logged."""
    counts = ", ".join(f"{count} {done}" for done, count in report.counts.items())
    console.print(
        f"{out}: {report.size / 1e6:.1f} MB ({counts}); relative error of the factors "
        f"{report.mean_error:.3f} on average, {report.worst.error:.3f} at worst "
        f"({report.worst.name})"
    )


def show_plan(
    plan: "Plan", device: Any, budget: int | None, seconds: float, *, deep: bool = False
) -> None:
    """What would be done to which tensors, in which batches, and at what cost."""
    from poemerge.rules import MEANINGS

    table = Table(
        title=f"{plan.method.name} of {len(plan.experts)} experts",
        title_justify="left",
        caption="at a time: tensors of a batch, solved together; or its slices of rows",
        caption_justify="left",
    )
    for column in ("rule", "what happens", "tensors", "shape", "updates", "at a time"):
        table.add_column(column, justify="right" if column == "tensors" else "left")
    limit = plan.limit(device, budget)
    for rule, meaning in MEANINGS.items():
        rows = _by_shape([group for group in plan.groups if group.rule == rule])
        for index, ((shape, form), groups) in enumerate(rows.items()):
            count = str(sum(len(group.tensors) for group in groups))
            said = (rule, meaning) if index == 0 else ("", "")
            batch = _at_a_time(groups[0], limit, local=plan.method.local)
            table.add_row(*said, count, shape, form, batch)
    console.print(table)
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print(
        f"peak memory about {plan.peak_bytes(device, budget) / 1e9:.2f} GB; reads "
        f"{plan.read_bytes / 1e9:.2f} GB; about {seconds:.0f} s on this machine"
    )
    seen = "every value" if deep else "some rows of each tensor (--deep: every value)"
    console.print(f"looked at: headers, and {seen}")


def _by_shape(groups: "Sequence[Group]") -> "dict[tuple[str, str], list[Group]]":
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        found.setdefault(("×".join(map(str, group.shape)), _form(group)), []).append(group)
    return dict(sorted(found.items()))


def _at_a_time(group: "Group", limit: int, *, local: bool) -> str:
    """How the tensors of a group are cut into batches."""
    if group.rule == "tied":
        return ""
    batches = list(group.batches(limit, local=local))
    if batches[0].rows is not None:
        return f"{batches[0].rows[1]} rows"
    return str(len(batches[0].tensors))


def show_methods(methods: Mapping[str, "Method"]) -> None:
    """Every method: what it does, its settings with defaults and meanings, its source."""
    for method in methods.values():
        console.print(f"[bold]{method.name}[/]  {method.summary}")
        names = [name for name, *_ in method.settings.describe()]
        needs = "needs data for precision diagonal and activation alone"
        needs = needs if "curvature" in names else "needs no data"
        console.print(f"  [dim]{method.source}; {needs}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, default, meaning in method.settings.describe():
            table.add_row(f"[cyan]{name}[/]", json.dumps(default), meaning)
        console.print(table)


def _form(group: "Group") -> str:
    if not group.voters:
        return ""
    form = f"{len(group.voters)} in factors, Σ rank {group.joint_rank}"
    pieces = f", {len(group.cut.sizes)} pieces" if group.cut else ""
    return (form if group.in_factors else f"{len(group.voters)} dense") + pieces
