"""A decision on who is champion, and all of them in order; audit_table.py keeps them in MLflow."""

import json
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from getpass import getuser
from os import environ, getuid
from typing import Literal, Self, get_args

from poemerge.hashing import digest

FORMAT = "poemerge/decision/1"  # raise it when a decision's fields change their meaning
Kind = Literal["promotion", "refusal", "rollback", "approval", "rejection", "lost"]
MOVES: tuple[Kind, ...] = ("promotion", "rollback")


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

    @property
    def words(self) -> str:
        """All of it for people, in Markdown."""
        said = f"**{self.kind}** of version {self.version}, {self.when}, by {self.who}"
        verdicts = {True: "passed", False: "failed"}
        gates = [f"- {g.name} {verdicts[g.passed]}: {g.sentence}" for g in self.gates]
        return "\n".join([f"{said}: {self.reason}", "", *gates]).rstrip()

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
