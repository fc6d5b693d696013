"""The audit table of a registered model: every decision about it, in order, for good.

A decision is a version of a second registered model, `NAME-decisions`. MLflow numbers versions
without gaps and gives no number twice, in SQLite as on a server, so machines that share nothing but
MLflow agree on the order. Every decision carries the hash of the one before it, with two effects:

- A row that was changed, taken away or slipped in breaks the chain, which `problems` tells.
- Appending is a compare-and-swap. Of two decisions that follow the same one, the lower number is in
  force and the other is void: its author sees that, looks at what has changed, and decides again.

Nobody holds a lock meanwhile, so nobody who dies blocks the others.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from getpass import getuser
from os import environ, getuid
from typing import Any, Literal, Self, get_args

from poemerge.errors import SourceError
from poemerge.lineage import digest
from tasks.versions import every, make_model

FORMAT = "poemerge/decision/1"  # raise it when a decision's fields change their meaning
Kind = Literal["promotion", "refusal", "rollback", "approval", "rejection", "lost"]
MOVES: tuple[Kind, ...] = ("promotion", "rollback")
BODY, HASH = "poemerge.decision.body", "poemerge.decision.hash"  # tags of a row
SUFFIX = "-decisions"
ABOUT = "Decisions on who is champion, for `poemerge audit`; nothing here is ever changed."


def who() -> str:
    """The name at MLflow where there is one, else the one at this machine."""
    try:
        return environ.get("MLFLOW_TRACKING_USERNAME") or getuser()
    except (KeyError, OSError):  # a container that runs under a bare number
        return f"user {getuid()}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Gate:
    """One question and its answer.

    Attributes:
        name: of the gate, as people and the audit table have it.
        passed: what it says.
        wanted: the number of params.yaml, or how many must hold.
        found: the number of this version; None where there was nothing to ask.
        margin: how far inside, or outside if negative.
        sentence: all of it in words.
    """

    name: str
    passed: bool
    wanted: float
    found: float | None
    margin: float | None
    sentence: str


@dataclass(frozen=True)
class Decision:
    """What was decided about one version.

    Attributes:
        kind: promotion and rollback move the champion, the others do not.
        version: that it is about.
        champion: at that time; None where nothing was live.
        reason: why, in a sentence.
        gates: that were asked.
        who: decided.
        when: in UTC.
        before: hash of the decision before; empty for the first.
        nonce: makes each one's hash its own.
    """

    kind: Kind
    version: int
    champion: int | None
    reason: str
    gates: tuple[Gate, ...] = ()
    who: str = field(default_factory=who)
    when: str = field(default_factory=now)
    before: str = ""
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)
    format: str = FORMAT

    @cached_property
    def hash(self) -> str:
        """sha256 of everything in it."""
        return digest(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its tag; a ValueError, KeyError or TypeError says that it is none."""
        body = json.loads(text)
        if body["kind"] not in get_args(Kind) or body["format"] != FORMAT:
            raise ValueError(body["kind"])
        return cls(**body | {"gates": tuple(Gate(**gate) for gate in body["gates"])})


@dataclass(frozen=True)
class Row:
    """A decision at its place in the table; void if another came first."""

    number: int
    decision: Decision
    void: bool = False

    @property
    def moves(self) -> bool:
        """True if the champion is another one since."""
        return self.decision.kind in MOVES and not self.void


@dataclass(frozen=True)
class Ledger:
    """All decisions about one model.

    Attributes:
        rows: in order.
        problems: what is wrong with the chain, in sentences.
        unread: numbers of the decisions that nobody here can read.
    """

    rows: tuple[Row, ...] = ()
    problems: tuple[str, ...] = ()
    unread: tuple[int, ...] = ()

    @property
    def head(self) -> str:
        """Hash of the last decision in force."""
        return next((r.decision.hash for r in reversed(self.rows) if not r.void), "")

    @property
    def last_move(self) -> Row | None:
        """The decision by which the champion is what it is."""
        return next((row for row in reversed(self.rows) if row.moves), None)

    @property
    def champions(self) -> tuple[int, ...]:
        """The champion, last, and those that a rollback would bring back, one after the other."""
        stack: list[int] = []
        for decision in (row.decision for row in self.rows if row.moves):
            if decision.kind == "rollback":
                while stack and stack[-1] != decision.version:
                    stack.pop()
            elif not stack and decision.champion is not None:
                stack.append(decision.champion)
            if not stack or stack[-1] != decision.version:
                stack.append(decision.version)
        return tuple(stack)

    def taken_back(self, version: int) -> Row | None:
        """The rollback that took this version out, unless it was promoted again since."""
        for row in reversed(self.rows):
            decision = row.decision
            if row.moves and decision.kind == "rollback" and decision.champion == version:
                return row
            if row.moves and decision.version == version:
                return None
        return None


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
            return row


def _create(client: Any, name: str, decision: Decision) -> None:
    """Write a row down; MLflow does that with all its tags, or not at all."""
    if not client.search_registered_models(f"name = '{name}'"):
        make_model(client, name, description=ABOUT)
    body = json.dumps(asdict(decision), sort_keys=True)
    client.create_model_version(
        name,
        f"poemerge://decision/{decision.hash}",  # there are no bytes; MLflow wants a source
        tags={BODY: body, HASH: decision.hash},
        description=f"{decision.kind} of version {decision.version}",
        await_creation_for=0,
    )
