"""Promotion in a real registry: what moves, what stays, and what is left when it is cut short."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from poemerge.errors import SourceError
from tasks import promote, versions
from tasks.audit_table import BODY, HASH, append, read
from tasks.decisions import Decision
from tasks.promote import Evaluation, Judgement, Row, evidence
from tasks.promote.moves import move, settle
from tests.tasks.registry import (
    LIMITS,
    NAME,
    TASKS,
    add_version,
    aliases,
    client,
    new_repository,
    outcomes,
    write_evaluation,
)

ROOT = Path(__file__).parents[2]
POOR, GOOD, BEST = (dict.fromkeys(TASKS, right) for right in (16, 28, 38))


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    monkeypatch.chdir(tmp_path)
    new_repository(tmp_path, database)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Path:
    """A registry in which three versions went live, one after the other."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        new_repository(folder, database)
        for text, right in (("one", POOR), ("two", GOOD), ("three", BEST)):
            add_version(text, right)
            run()
    return folder


@pytest.fixture
def _three_champions(_registry: None, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)


def never(_model: Path, _like: Evaluation) -> Path:
    raise AssertionError("nothing was to be evaluated anew")


def judge(number: int | None = None, *, by_hand: bool = True, **how: Any) -> Judgement:
    how = {"verify": lambda _: (), "rescore": never} | how
    return promote.judge(NAME, number, how.pop("limits", LIMITS), by_hand=by_hand, **how)


def run(number: int | None = None, **how: Any) -> Row:
    return promote.promote(judge(number, **how), "because")


def failed(judgement: Judgement) -> list[str]:
    return [gate.name for gate in judgement.gates if not gate.passed]


def whole() -> tuple[Row, ...]:
    ledger = promote.audit(NAME)
    assert ledger.problems == ()
    return ledger.rows


def damage(number: int) -> None:
    """Change a byte of the version's weights in DVC's cache."""
    text = Path("artifacts/merge").iterdir()
    wanted = client().get_model_version(NAME, str(number)).source.split("/")[-2]
    (folder,) = [path for path in text if path.name == wanted]
    for blob in Path(".dvc/cache/files/md5").rglob("*"):
        if blob.is_file() and blob.read_text() == folder.name:
            blob.chmod(0o644)
            blob.write_text("tampered")


def test_a_first_version_goes_live_and_its_tags_say_why() -> None:
    add_version("one", POOR)
    row = run()
    assert (row.number, row.decision.kind, row.decision.champion) == (1, "promotion", None)
    assert aliases() == {"challenger": 1, "champion": 1}
    tags = client().get_model_version(NAME, "1").tags
    assert tags[versions.DECISION] == f"1 {row.decision.hash}"
    assert "no champion" in tags[versions.GAIN]
    assert tags[versions.PROMOTED] == f"{row.decision.when} by {row.decision.who}"


def test_a_better_one_takes_its_place_and_a_worse_one_does_not() -> None:
    add_version("one", GOOD)
    run()
    add_version("two", BEST)
    assert run().decision.kind == "promotion"
    assert aliases() == {"challenger": 2, "champion": 2, "previous": 1}
    assert "+25.0 on the mean" in client().get_model_version(NAME, "2").tags[versions.GAIN]

    add_version("three", POOR)
    judgement = judge()
    assert failed(judgement) == ["gain", "drop"]
    row = promote.promote(judgement, "")
    assert row.decision.kind == "refusal"
    assert "-55.0 on the mean" in row.decision.reason
    assert aliases() == {"challenger": 3, "champion": 2, "previous": 1}
    assert [row.decision.kind for row in whole()] == ["promotion", "promotion", "refusal"]
    assert whole()[-1].decision.gates == judgement.gates


def test_the_champion_is_not_judged_against_itself() -> None:
    add_version("one", POOR)
    run()
    assert judge().is_champion
    assert len(whole()) == 1


def test_certificates_and_lineage_are_asked_where_params_say_so() -> None:
    add_version("one", POOR, certificate={"converged": False, "energies": [1.0]})
    asked: list[str] = []

    def verify(ref: str) -> list[str]:
        asked.append(ref)
        return ["The base changed."]

    assert failed(judge(verify=verify)) == ["certificates", "lineage"]
    assert asked == [f"models:/{NAME}/1"]
    easy = replace(LIMITS, certificates=False, verify=False)
    assert judge(verify=verify, limits=easy).passed


@pytest.mark.parametrize("limits", [LIMITS, replace(LIMITS, verify=False)])
def test_damaged_bytes_never_go_live(limits: promote.Limits) -> None:
    add_version("one", POOR)
    run()
    add_version("two", BEST)
    damage(2)
    assert failed(judge(limits=limits)) == ["bytes"]
    assert run(limits=limits).decision.kind == "refusal"
    assert aliases()["champion"] == 1


def test_a_champion_evaluated_otherwise_is_evaluated_again(tmp_path: Path) -> None:
    add_version("one", {"odd": 5, "even": 5}, limit=10)
    run()
    add_version("two", BEST)
    seen: list[dict] = []

    def rescore(model: Path, like: Evaluation) -> Path:
        assert (model / "model.safetensors").read_text() == "one"
        seen.append(dict(like.params))
        write_evaluation(tmp_path / "again", {task: outcomes(20) for task in TASKS})
        return tmp_path / "again"

    judgement = judge(rescore=rescore)
    assert judgement.passed
    assert [params["limit"] for params in seen] == [40]
    assert judgement.gates[2].sentence.startswith("+45.0 on the mean")


@pytest.mark.parametrize(("how", "words"), [
    ({"limit": 10}, "limit 40 against 10"),
    ({"data": "second"}, "items of odd, even"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(how: dict, words: str) -> None:
    add_version("one", POOR, **how)
    run()
    add_version("two", BEST)

    def rescore(_model: Path, _like: Evaluation) -> Path:
        raise SourceError("The base is gone.")

    judgement = judge(rescore=rescore)
    assert failed(judgement) == ["items"]
    assert words in judgement.refusal
    assert "The base is gone" in judgement.refusal


@pytest.mark.usefixtures("_three_champions")
def test_rollback_goes_back_one_champion_at_a_time() -> None:
    assert promote.rollback(NAME, "complaints").decision.version == 2
    assert aliases() == {"challenger": 3, "champion": 2, "previous": 1}
    promote.rollback(NAME, "more of them")
    assert aliases() == {"challenger": 3, "champion": 1}
    with pytest.raises(SourceError, match="no earlier champion"):
        promote.rollback(NAME, "")
    assert [row.decision.reason for row in whole()][-2:] == ["complaints", "more of them"]


def test_what_was_taken_back_needs_a_person_who_names_it() -> None:
    add_version("one", POOR)
    run()
    add_version("two", BEST)
    run()
    promote.rollback(NAME, "it swears")
    for judgement in (judge(), judge(2, by_hand=False)):
        assert failed(judgement) == ["recall"]
        assert "decision 3 took it back (it swears)" in judgement.refusal
    assert run(2).decision.kind == "promotion"
    assert aliases()["champion"] == 2
    assert promote.audit(NAME).taken_back(2) is None


def test_a_damaged_version_is_not_rolled_back_to() -> None:
    add_version("one", POOR)
    run()
    add_version("two", BEST)
    run()
    damage(1)
    row = promote.rollback(NAME, "")
    assert row.decision.kind == "refusal"
    assert "its bytes are" in row.decision.reason or "damaged" in row.decision.reason
    assert aliases()["champion"] == 2


def test_an_alias_set_by_hand_before_the_first_decision_counts() -> None:
    add_version("one", GOOD)
    client().set_registered_model_alias(NAME, "champion", "1")
    add_version("two", BEST)
    assert run().decision.champion == 1
    assert aliases()["previous"] == 1
    promote.rollback(NAME, "")
    assert aliases()["champion"] == 1


def test_what_is_so_already_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is notified of aliases hears of promotions, and of nothing else."""
    add_version("one", GOOD)
    run()
    add_version("two", POOR)
    for name in ("set_registered_model_alias", "set_model_version_tag"):
        monkeypatch.setattr(MlflowClient, name, None)
    assert run().decision.kind == "refusal"


def test_an_alias_set_by_hand_later_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    add_version("one", GOOD)
    run()
    add_version("two", POOR)
    client().set_registered_model_alias(NAME, "champion", "2")
    assert not judge().is_champion
    assert aliases()["champion"] == 1
    assert "champion of tiny was version 2, but decision 1" in caplog.text


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


@pytest.mark.usefixtures("_three_champions")
class TestAudit:
    def test_it_is_whole(self) -> None:
        assert [row.number for row in whole()] == [1, 2, 3]

    def test_a_changed_row_shows(self) -> None:
        body = json.loads(client().get_model_version("tiny-decisions", "2").tags[BODY])
        text = json.dumps(body | {"who": "somebody else"})
        client().set_model_version_tag("tiny-decisions", "2", BODY, text)
        assert promote.audit(NAME).problems[:2] == (
            "Decision 2 was changed.",
            "Decision 3 follows one that is not there.",
        )

    @pytest.mark.parametrize("number", ["1", "2", "3"])
    def test_a_missing_row_shows(self, number: str) -> None:
        client().delete_model_version("tiny-decisions", number)
        problems = promote.audit(NAME).problems
        assert any(f"Decision {number}" in each and "missing" in each for each in problems)

    def test_the_end_is_not_cut_off_unseen(self) -> None:
        """Nothing follows the last row, and a refusal leaves no tag at its version either."""
        add_version("four", POOR)
        assert run().decision.kind == "refusal"
        client().delete_model_version("tiny-decisions", "4")
        cut = "Decision 4, the last that was made, is missing."
        assert promote.audit(NAME).problems == (cut,)
        assert run().number == 5
        assert promote.audit(NAME).problems == ("Decision 4 is missing.", cut)

    def test_a_table_made_anew_is_not_taken_for_the_old_one(self) -> None:
        client().delete_registered_model("tiny-decisions")
        assert "Decision 3, the last that was made, is missing." in promote.audit(NAME).problems
        for _ in range(4):
            add_version("four", POOR)
            run()
        assert "Decision 3, the last that was made, is missing." in promote.audit(NAME).problems

    def test_a_last_row_that_was_made_again_shows(self) -> None:
        body = json.loads(client().get_model_version("tiny-decisions", "3").tags[BODY])
        forged = Decision.parse(json.dumps(body | {"who": "somebody else"}))
        for key, value in ((BODY, json.dumps(asdict(forged))), (HASH, forged.hash)):
            client().set_model_version_tag("tiny-decisions", "3", key, value)
        assert "Decision 3, the last that was made, is missing." in promote.audit(NAME).problems

    def test_what_cannot_be_read_may_have_moved_the_champion(self) -> None:
        body = json.loads(client().get_model_version("tiny-decisions", "3").tags[BODY])
        text = json.dumps(body | {"format": "poemerge/decision/2"})
        client().set_model_version_tag("tiny-decisions", "3", BODY, text)
        assert "Decision 3 is unreadable." in promote.audit(NAME).problems
        with pytest.raises(SourceError, match=r"Decision 3 .* made by a newer poemerge; update"):
            promote.rollback(NAME, "")
        assert aliases()["champion"] == 3

    def test_the_table_stays_of_use(self) -> None:
        client().delete_model_version("tiny-decisions", "1")
        ledger = settle(client(), NAME)
        assert ledger.champions[-2:] == (2, 3)
        promote.rollback(NAME, "")
        assert aliases()["champion"] == 2
        assert read(client(), NAME).problems
