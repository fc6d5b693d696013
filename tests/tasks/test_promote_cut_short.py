"""A promotion that is cut short or comes late: what is left, and who is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tasks import promote, versions
from tasks.audit_table import append, read
from tasks.promote import evidence
from tasks.promote.moves import move, settle
from tests.tasks.promoting import BEST, GOOD, POOR, judge, run, whole
from tests.tasks.registry import NAME, add_version, aliases, client

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("in_a_registry")


class Cut(Exception):  # noqa: N818 - not an error, but the end of a process
    """Raised in the middle of a promotion."""


class Fuse:
    """A client of MLflow that does `calls` calls, and then something else."""

    def __init__(self, real: Any, calls: int, then: Callable[[], None]) -> None:
        self.real, self.calls, self.then = real, calls, then

    def __getattr__(self, name: str) -> Any:
        if self.calls == 0:
            self.then()
        self.calls -= 1
        return getattr(self.real, name)


def test_cut_short_anywhere_a_champion_is_complete_and_a_rerun_ends_it() -> None:
    def end() -> None:
        raise Cut

    for text, right in (("one", POOR), ("two", BEST)):
        add_version(text, right)
        run()
    seen = []
    for calls in count():
        live = aliases()["champion"]
        new = 3 - live
        basis = read(client(), NAME).last_move
        # A time of its own each: two in one second would leave the tag of it as it is, a call less.
        wish = promote.Decision("promotion", new, live, "cut short", when=f"after {calls} calls")
        try:
            move(Fuse(client(), calls, end), NAME, wish, basis)
            break
        except Cut:
            seen.append(aliases()["champion"] == new)
        assert aliases()["champion"] in {live, new}
        champion = versions.resolve(client(), f"models:/{NAME}@champion")
        assert evidence.damage(champion) == ()
        if settle(client(), NAME).champions[-1] != new:  # the rerun of a person
            move(client(), NAME, wish, basis)
        assert aliases() == {"challenger": 2, "champion": new, "previous": live}
    assert set(seen) == {True, False}
    assert len(seen) > 8
    whole()


KILLED = """
import os, signal, sys
from tasks.promote import Limits, judge, promote
from tasks.promote import moves
from tests.tasks.registry import LIMITS, NAME
point = sys.argv[1]
def die(*_args, **_how):
    os.kill(os.getpid(), signal.SIGKILL)
if point == "decided":
    moves.settle = die
else:
    from mlflow import MlflowClient
    real = MlflowClient.set_registered_model_alias
    def set_alias(self, name, alias, number):
        real(self, name, alias, number)
        die()
    MlflowClient.set_registered_model_alias = set_alias
promote(judge(NAME, None, LIMITS, by_hand=True, verify=lambda ref: (), rescore=die), "")
"""


def test_a_killed_promotion_is_ended_by_the_next_command() -> None:
    for number, point in enumerate(("decided", "between the aliases"), 2):
        if number == 2:
            add_version("one", POOR)
            run()
        add_version(f"v{number}", GOOD if number == 2 else BEST)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, point],
            env=os.environ | {"PYTHONPATH": os.fspath(ROOT)}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert aliases()["champion"] == number - 1
        assert judge().is_champion  # the decision is in force, and the aliases follow
        assert aliases() == {"challenger": number, "champion": number, "previous": number - 1}


def test_whoever_is_late_is_told_who_came_first() -> None:
    add_version("one", POOR)
    run()
    two, three = add_version("two", GOOD), add_version("three", BEST)
    first, second = judge(two), judge(three)
    won = promote.promote(second, "")
    lost = promote.promote(first, "")
    assert (won.decision.kind, lost.decision.kind) == ("promotion", "lost")
    assert f"decision {won.number} by {won.decision.who}" in lost.decision.reason
    assert "run the same command again" in lost.decision.reason
    assert aliases() == {"challenger": three, "champion": three, "previous": 1}


def test_of_two_that_follow_the_same_decision_the_first_is_in_force() -> None:
    """Somebody else's decision lands between this one's look and its writing."""
    add_version("one", POOR)
    add_version("two", GOOD)
    first, second = judge(1), judge(2)
    calls = []

    def decide(_ledger: Any) -> promote.Decision:
        if not calls:
            calls.append(promote.promote(first, "in between"))
        return promote.Decision("approval", 2, None, "fine", second.gates)

    row = append(client(), NAME, decide)
    rows = whole()
    assert [(r.decision.kind, r.void) for r in rows] == [
        ("promotion", False), ("approval", True), ("approval", False)
    ]  # fmt: skip
    assert row == rows[-1]
    assert row.decision.before == rows[0].decision.hash
