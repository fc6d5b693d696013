"""The audit table of a registered model: every decision about it, in order, for good.

A decision is a version of a second registered model, `NAME-decisions`. MLflow numbers versions
without gaps and gives no number twice, in SQLite as on a server, so machines that share nothing but
MLflow agree on the order. Every decision carries the hash of the one before it, with two effects:

- A row that was changed, taken away or slipped in breaks the chain, which `problems` tells.
- Appending is a compare-and-swap. Of two decisions that follow the same one, the lower number is in
  force and the other is void: its author sees that, looks at what has changed, and decides again.

The last row has none after it that would miss it. Its number and hash are a tag of the model `NAME`
itself, the seal, so that one cannot cut off the end, or all of it, in the table alone.

Nobody holds a lock meanwhile, so nobody who dies blocks the others.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from poemerge.errors import SourceError
from tasks.decisions import Decision, Ledger, Row
from tasks.versions import DECISION, every, make_model, tag_model, tags_of

BODY, HASH = "poemerge.decision.body", "poemerge.decision.hash"  # tags of a row
SEAL = "poemerge.decisions"  # tag of the model: number and hash of the last row
SUFFIX = "-decisions"
ABOUT = "Decisions on who is champion, for `poemerge audit`; nothing here is ever changed."


def read(client: Any, name: str) -> Ledger:
    """The table of the model `name`, its chain followed from the first row on."""
    rows: list[Row] = []
    problems: list[str] = []
    seen, last = {""}, 0  # hashes that a decision may follow: the last in force, or void
    head, unread = "", []
    for version in every(client, name + SUFFIX):
        number = int(version.version)
        problems += [f"Decision {gone} is missing." for gone in range(last + 1, number)]
        last = number
        try:
            decision = Decision.parse(version.tags[BODY])
        except (ValueError, KeyError, TypeError):
            problems.append(f"Decision {number} is unreadable.")
            unread.append(number)
            continue
        if decision.hash != version.tags.get(HASH):
            problems.append(f"Decision {number} was changed.")
        void = decision.before != head and decision.before in seen
        if decision.before not in seen:
            problems.append(f"Decision {number} follows one that is not there.")
        rows.append(Row(number, decision, void))
        if not void:
            head = decision.hash
            seen.add(head)
    return Ledger(tuple(rows), tuple(problems), tuple(unread))


def lost(client: Any, name: str, ledger: Ledger) -> Iterator[str]:
    """Decisions that the model or a version of it speaks of, and that are not there; in sentences.

    Args:
        client: of MLflow.
        name: of the model.
        ledger: its table, as it was read.
    """
    known = {row.decision.hash for row in ledger.rows}
    marks = {
        f"which made version {v.version} champion": v.tags.get(DECISION)
        for v in every(client, name)
    }
    marks["the last that was made"] = tags_of(client, name).get(SEAL)
    for words, mark in marks.items():
        number, _, sealed = (mark or "").partition(" ")
        if mark and sealed not in known:
            yield f"Decision {number}, {words}, is missing."


def current(client: Any, name: str) -> Ledger:
    """The table as those need it who move something.

    Raises:
        SourceError: a row cannot be read, which may have moved the champion.
    """
    ledger = read(client, name)
    if ledger.unread:
        number = ledger.unread[0]
        message = (
            f"Decision {number} about {name} was changed, or made by a newer poemerge; update "
            f"poemerge, or else delete version {number} of {name}{SUFFIX} in MLflow."
        )
        raise SourceError(message)
    return ledger


def append(client: Any, name: str, decide: Callable[[Ledger], Decision]) -> Row:
    """Add a decision that takes into account all that were made before it.

    Args:
        client: of MLflow.
        name: of the model that it is about.
        decide: what to decide in view of the table; asked again if somebody else came first.
    """
    while True:
        ledger = current(client, name)
        decision = replace(decide(ledger), before=ledger.head)
        _create(client, name + SUFFIX, decision)
        rows = read(client, name).rows
        row = next(row for row in rows if row.decision.hash == decision.hash)
        if not row.void:
            _seal(client, name)
            return row


def _seal(client: Any, name: str) -> None:
    """Note with the model which row is the last, unless it speaks of one that is gone.

    Whoever seals looks afterwards whether that is still so: the last to write has seen the last.
    """
    while True:
        ledger = read(client, name)
        if any(lost(client, name, ledger)):
            return
        last = ledger.rows[-1]
        tag_model(client, name, {SEAL: f"{last.number} {last.decision.hash}"})
        if read(client, name).rows[-1] == last:
            return


def _create(client: Any, name: str, decision: Decision) -> None:
    """Write a row down; MLflow does that with all its tags, or not at all."""
    if not client.search_registered_models(f"name = '{name}'"):
        make_model(client, name, description=ABOUT)
    body = json.dumps(asdict(decision), sort_keys=True)
    client.create_model_version(
        name,
        f"poemerge://decision/{decision.hash}",  # there are no bytes; MLflow wants a source
        tags={BODY: body, HASH: decision.hash},
        description=decision.words,
        await_creation_for=0,
    )
