"""What people see of promotion: gates with their numbers, decisions in order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from flows.console import board_table, console

if TYPE_CHECKING:
    from tasks.promote import Ledger

ENDINGS = {
    "promotion": "[bold green]promoted[/]: version {version} of {name} is champion, after {was}",
    "refusal": "[bold red]refused[/]: version {version} of {name} stays as it is; champion: {was}",
    "rejection": "[bold red]rejected[/] by {who}: {reason}; champion: {was}",
    "lost": "[bold red]too late[/]: {reason}; champion: {was}",
    "rollback": "[bold green]rolled back[/]: version {version} of {name} is champion, after {was}",
    "champion": "version {version} of {name} is champion already",
}


def show_promotion(outcome: Mapping[str, Any]) -> None:
    """The gates that were asked, and what came of it."""
    if outcome["gates"]:
        console.print(_gates(outcome["gates"]))
    was = f"version {outcome['champion']}" if outcome["champion"] else "none"
    words = {key: escape(str(value)) for key, value in outcome.items()} | {"was": was}
    ending = ENDINGS[outcome["kind"]].format(**words)
    decision = f" (decision {outcome['number']})" if outcome["number"] else ""
    console.print(f"{ending}{decision}", soft_wrap=True)


def show_audit(name: str, ledger: "Ledger", *, as_json: bool) -> None:
    """Every decision, and whether the chain is whole."""
    if as_json:
        rows = [
            {"number": row.number, "void": row.void, "hash": row.decision.hash}
            | asdict(row.decision)
            for row in ledger.rows
        ]
        whole = {"name": name, "decisions": rows, "problems": list(ledger.problems)}
        console.print_json(json.dumps(whole))
        return
    has_void = any(row.void for row in ledger.rows)
    meaning = "void: another came first; nothing came of it" if has_void else None
    table = board_table(f"Decisions about {name}", meaning)
    for column in ("", "when", "who", "what", "version", "champion", "why"):
        table.add_column(column, overflow="fold")
    for row in ledger.rows:
        it = row.decision
        champion = "" if it.champion is None else str(it.champion)
        what = f"{it.kind}, void" if row.void else it.kind
        cells = (str(row.number), it.when, it.who, what, str(it.version), champion, it.reason)
        table.add_row(*map(escape, cells), style="dim" if row.void else "")
    console.print(table)
    for problem in ledger.problems:
        console.print(f"[bold red]broken[/] {problem}")
    if not ledger.problems:
        count = len(ledger.rows)
        console.print(f"The chain is whole: {count} decision{'s' * (count != 1)}, none changed.")


def _gates(gates: Sequence[Mapping[str, Any]]) -> Any:
    table = board_table(
        "Gates", "numbers with digits are scores, fractions of 1; others are counts"
    )
    table.add_column("gate")
    table.add_column("")
    for column in ("wanted", "found", "margin"):
        table.add_column(column, justify="right")
    table.add_column("in words", overflow="fold")
    for gate in gates:
        numbers = (_number(gate["wanted"]), _number(gate["found"]), _number(gate["margin"], "+"))
        verdict = "[green]passed[/]" if gate["passed"] else "[red]failed[/]"
        table.add_row(gate["name"], verdict, *numbers, escape(gate["sentence"]))
    return table


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}d}" if isinstance(value, int) else f"{value:{sign}.4f}"
