"""`poemerge plan` in the terminal."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from flows.console import console
from flows.planning import Outlook

UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def show_outlook(outlook: Outlook, title: str) -> None:
    """What it takes, and how long with how many workers."""
    cost, longest = outlook.cost, outlook.longest
    rates = outlook.schedules[1].rates
    alone = rates.total(longest.cost)
    console.print(
        f"[bold]{title}[/]: {_count(len(outlook.jobs), 'job')}, a shard each\n"
        f"reads {amount(cost.read, 'B')}, writes {amount(cost.written, 'B')}; "
        f"{amount(cost.single, 'FLOP')} in fp32, {amount(cost.double, 'FLOP')} in fp64; "
        f"peak memory of a worker about {amount(outlook.peak_bytes, 'B')}\n"
        f"longest job: {longest.file}, {span(alone)}"
    )
    table = Table(caption="busy: of the time, by an average worker", caption_justify="left")
    for column in ("workers", "time", "busy", "most of it is"):
        table.add_column(column, justify="left" if column == "most of it is" else "right")
    for count, each in outlook.schedules.items():
        style = "bold" if count == outlook.best else ""
        row = (str(count), span(each.seconds), f"{each.busy:.0%}", each.bottleneck)
        table.add_row(*row, style=style)
    console.print(table)
    if outlook.best < max(outlook.schedules):
        text = f"more than {_count(outlook.best, 'worker')} would wait: a job is a shard"
        console.print(f"{text}, and smaller shards of the base would spread better")
    for note in outlook.notes:
        console.print(f"[yellow]note[/] {escape(note)}")


def show_comparison(outlooks: Mapping[str, Outlook], title: str) -> None:
    """What every method takes, the quickest first, with as many workers as were asked for."""
    workers = max(next(iter(outlooks.values())).schedules)
    table = Table(title=f"{title}, {_count(workers, 'worker')}", title_justify="left")
    table.add_column("method")
    for column in ("reads", "fp32", "fp64", "memory of a worker", "time"):
        table.add_column(column, justify="right")
    table.add_column("most of it is")
    for name, each in sorted(outlooks.items(), key=lambda item: item[1].schedules[workers].seconds):
        cost, made = each.cost, each.schedules[workers]
        operations = (amount(cost.single, "FLOP"), amount(cost.double, "FLOP"))
        takes = (amount(cost.read, "B"), *operations, amount(each.peak_bytes, "B"))
        table.add_row(name, *takes, span(made.seconds), made.bottleneck)
    console.print(table)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def amount(number: float, unit: str) -> str:
    """With three digits and a prefix."""
    for size, prefix in UNITS:
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def span(seconds: float) -> str:
    """In the unit that people would use."""
    for size, unit in SPANS:
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
