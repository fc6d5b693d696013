"""The doctor's findings as people read them."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from flows.console import console
from flows.doctor.finding import Finding

COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def show_findings(findings: Sequence[Finding]) -> None:
    """A line for each, and below it what to do."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        status = Text(finding.status, COLOURS[finding.status])
        table.add_row(status, Text(finding.name), Text(finding.said))
        if finding.advice:
            table.add_row("", "", Text(f"→ {finding.advice}", "dim"))
    console.print(table)
