"""Commands on what is live: promote, rollback, audit."""

from pathlib import Path
from typing import Any

import click

from flows.cli.options import params_option

reason_option = click.option("--reason", default="", metavar="TEXT", help="For the audit table.")
DONE = frozenset({"promotion", "rollback", "champion"})


@click.command()
@params_option
@click.option(
    "--version", type=click.IntRange(min=1), metavar="N", help="To promote. [the challenger]"
)
@click.option("--approve", is_flag=True, help="Once the gates have passed, wait for a person.")
@click.option(
    "--timeout",
    default=3600,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="S",
    help="Of waiting; nobody's answer is a no.",
)
@reason_option
def promote(params: Path, version: int | None, timeout: int, reason: str, *, approve: bool) -> None:
    """Make a registered version champion, if it passes the gates of `promote` in params.yaml.

    A refusal says which gate, both numbers and the margin, and ends with 1. With --approve a person
    answers in Prefect, under "Resume" of the run.
    """
    from flows.console import start_logging
    from flows.params import load

    loaded = load(params)
    start_logging()
    from flows import promote as promotion

    if not approve:
        _end(promotion.promote(loaded, version, reason))
        return
    from flows.prefect_server import asked

    promotion.check_server()
    with asked(needed=True):
        outcome = promotion.promote_with_approval(str(params), version, reason, timeout)
    _end(outcome)


@click.command()
@params_option
@reason_option
def rollback(params: Path, reason: str) -> None:
    """Make the champion before the present one champion again.

    What is rolled back is not promoted again by a run, only by `poemerge promote --version`.
    """
    from flows.console import start_logging
    from flows.params import load

    loaded = load(params)
    start_logging()
    from flows import promote as promotion

    _end(promotion.rollback(loaded, reason))


@click.command()
@params_option
@click.option("--name", metavar="NAME", help="Of the registered model. [register.name]")
@click.option("--json", "as_json", is_flag=True, help="Every decision with its gates and hashes.")
def audit(params: Path, name: str | None, *, as_json: bool) -> None:
    """Show every decision about a model, in order, and whether one was changed; then end with 1."""
    from flows.decision_table import show_audit
    from flows.params import load
    from tasks.promote import audit as read

    name = name or load(params).register_.name
    ledger = read(name)
    show_audit(name, ledger, as_json=as_json)
    if ledger.problems:
        click.get_current_context().exit(1)


def _end(outcome: dict[str, Any]) -> None:
    from flows.decision_table import show_promotion

    show_promotion(outcome)
    if outcome["kind"] not in DONE:
        click.get_current_context().exit(1)
