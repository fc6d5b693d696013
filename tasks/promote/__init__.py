"""promote: which registered version is live. Gates are asked, a decision is kept, aliases follow.

No stage of the pipeline: it makes nothing, and what it decides lies in MLflow, where a team has it.
"""

from dataclasses import replace
from typing import Any

from poemerge.errors import SourceError
from tasks.audit_table import append, lost
from tasks.audit_table import read as read_table
from tasks.decisions import Decision, Gate, Kind, Ledger, Row
from tasks.promote import evidence, gates
from tasks.promote.evidence import Evaluation
from tasks.promote.judging import Judgement, Limits, judge
from tasks.promote.moves import move, settle
from tasks.tracking import connected
from tasks.versions import find, numbered

__all__ = ["Decision", "Evaluation", "Gate", "Judgement", "Ledger", "Limits", "Row", "judge"]


def promote(judgement: Judgement, reason: str) -> Row:
    """Make the version champion, or keep why not.

    Args:
        judgement: of the gates.
        reason: in people's own words, if there are any.

    Returns:
        A promotion; a refusal, if a gate failed; or `lost`, if somebody else was quicker.
    """
    if not judgement.passed:
        return note("refusal", judgement, judgement.refusal)
    name, number = judgement.name, judgement.version
    words = reason or "every gate passed"
    wish = Decision("promotion", number, judgement.champion, words, judgement.gates)
    with connected() as client:
        if problems := _damage(client, name, number):  # it may have waited for a person for days
            refusal = replace(wish, kind="refusal", reason=problems[0])
            return append(client, name, lambda _: refusal)
        return move(client, name, wish, judgement.basis)


def registered(name: str, digest: str) -> int | None:
    """The number of the version with these bytes."""
    with connected() as client:
        version = find(client, name, digest)
    return None if version is None else int(version.version)


def note(kind: Kind, judgement: Judgement, reason: str, **by: str) -> Row:
    """Keep a decision that moves nothing: refusal, approval or rejection; `by` may say `who`."""
    decision = Decision(kind, judgement.version, judgement.champion, reason, judgement.gates, **by)
    with connected() as client:
        return append(client, judgement.name, lambda _: decision)


def rollback(name: str, reason: str) -> Row:
    """Bring back the champion before, if its bytes are whole.

    Args:
        name: of the registered model.
        reason: in people's own words.

    Raises:
        SourceError: there was no champion before.
    """
    with connected() as client:
        ledger = settle(client, name)
        if len(ledger.champions) < 2:
            message = f"{name} has no earlier champion; `poemerge audit` shows what there was."
            raise SourceError(message)
        *_, previous, current = ledger.champions
        problems = _damage(client, name, previous)
        asked = (gates.intact("bytes", problems),)
        wish = Decision("rollback", previous, current, reason or "no reason given", asked)
        if problems:
            refusal = replace(wish, kind="refusal", reason=f"rollback: {problems[0]}")
            return append(client, name, lambda _: refusal)
        return move(client, name, wish, ledger.last_move)


def audit(name: str) -> Ledger:
    """Every decision about a model, and what is wrong with the table."""
    with connected() as client:
        ledger = read_table(client, name)
        return replace(ledger, problems=(*ledger.problems, *lost(client, name, ledger)))


def _damage(client: Any, name: str, number: int) -> tuple[str, ...]:
    version = numbered(client, name, number)
    return evidence.damage(version) if version else (f"Version {number} of {name} was deleted.",)
