"""Promotion in a real registry: which version goes live, which does not, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from poemerge.errors import SourceError
from tasks import promote, versions
from tasks.promote import Evaluation
from tests.tasks.promoting import BEST, GOOD, POOR, damage, failed, judge, run, whole
from tests.tasks.registry import (
    LIMITS,
    NAME,
    TASKS,
    add_version,
    aliases,
    client,
    outcomes,
    write_evaluation,
)

pytestmark = pytest.mark.usefixtures("in_a_registry")


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
