"""Moving the champion: a decision first, then the aliases, which can always be set again from it.

The table of decisions (audit_table.py) is the truth, aliases follow it. Whoever has added a
decision, or finds the aliases behind, sets tags, `previous` and last `champion`, and then looks
whether the table has moved on meanwhile; if so, once more. So the last to write has seen the last
decision, and whoever dies on the way leaves the old champion or the new one, both complete, and is
caught up with by the next command. Nothing but these functions moves `champion`; where a person did
so by hand, it is put back, with a warning.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.audit_table import append, current
from tasks.decisions import Decision, Ledger, Row
from tasks.versions import (
    CHAMPION,
    DECISION,
    GAIN,
    PREVIOUS,
    PROMOTED,
    aliases_of,
    every,
    numbered,
    point,
    tag,
)

logger = logging.getLogger(__name__)


def champion_of(client: Any, name: str, ledger: Ledger) -> int | None:
    """The number of the champion; before the first decision, what the alias says."""
    number = ledger.champions[-1] if ledger.champions else aliases_of(client, name).get(CHAMPION)
    return int(number) if number and numbered(client, name, number) else None


def move(client: Any, name: str, wish: Decision, basis: Row | None) -> Row:
    """Do what `wish` says, unless the champion is another one than it was judged against.

    Args:
        client: of MLflow.
        name: of the model.
        wish: a promotion or a rollback.
        basis: the last move when it was judged.

    Returns:
        The decision in force: the wish, or a `lost` one that says who came first.
    """

    def decide(ledger: Ledger) -> Decision:
        first = ledger.last_move
        if first is None or first == basis:
            return wish
        reason = f"{said(first)} came first; run the same command again to be compared with it"
        return replace(wish, kind="lost", champion=first.decision.version, reason=reason)

    row = append(client, name, decide)
    settle(client, name)
    return row


def settle(client: Any, name: str) -> Ledger:
    """Make tags and aliases say what the table says; see above."""
    while True:
        ledger = current(client, name)
        last = ledger.last_move
        if last is None:
            return ledger
        _point(client, name, ledger.champions, last)
        if current(client, name).last_move == last:
            return ledger


def said(row: Row) -> str:
    """A decision in a few words."""
    decision = row.decision
    what = f"{decision.kind} of" if decision.kind != "rollback" else "rollback to"
    return f"decision {row.number} by {decision.who} ({what} version {decision.version})"


def _point(client: Any, name: str, champions: Sequence[int], last: Row) -> None:
    """Tags, then `previous`, then `champion`, which decides. What is so already is not written.

    A write that changes nothing would tell everybody who is notified of a new champion.
    """
    champion, previous = [*reversed(champions), None][:2]
    there = {int(version.version): version for version in every(client, name)}
    aliases = aliases_of(client, name)
    if champion not in there:
        logger.warning("version %s of %s, the champion, was deleted in MLflow", champion, name)
        return
    tag(client, there[champion], _reasons(last))
    if previous not in there and PREVIOUS in aliases:
        client.delete_registered_model_alias(name, PREVIOUS)
    elif previous in there and aliases.get(PREVIOUS) != str(previous):
        point(client, name, PREVIOUS, previous)
    was = aliases.get(CHAMPION)
    if was not in {None, str(champion), str(last.decision.champion)}:
        logger.warning("champion of %s was version %s, but %s is in force", name, was, said(last))
    if was != str(champion):
        point(client, name, CHAMPION, champion)


def _reasons(row: Row) -> dict[str, str]:
    """Why a version is champion, for its tags."""
    decision = row.decision
    reasons = {DECISION: f"{row.number} {decision.hash}"}
    if decision.kind == "promotion":
        reasons[PROMOTED] = f"{decision.when} by {decision.who}"
        reasons[GAIN] = "; ".join(g.sentence for g in decision.gates if g.name == "gain")
    return reasons
