"""Judgements and promotions in the registry of the tests, and what damages a version there."""

from pathlib import Path
from typing import Any

from tasks import promote
from tasks.promote import Evaluation, Judgement, Row
from tests.tasks.registry import LIMITS, NAME, TASKS, client

POOR, GOOD, BEST = (dict.fromkeys(TASKS, right) for right in (16, 28, 38))


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
