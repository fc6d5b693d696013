"""Rolling back, one champion at a time; and the table of decisions, in which a change shows."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from poemerge.errors import SourceError
from tasks import promote
from tasks.audit_table import BODY, HASH, read
from tasks.decisions import Decision
from tasks.promote.moves import settle
from tests.tasks.promoting import BEST, GOOD, POOR, damage, failed, judge, run, whole
from tests.tasks.registry import NAME, add_version, aliases, client, new_repository

pytestmark = pytest.mark.usefixtures("in_a_registry")


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
def _three_champions(in_a_registry: None, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)


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
