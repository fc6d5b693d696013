"""The instrument itself: a claim that does not hold is counted, told, and fails its test."""

import ast
from pathlib import Path

import pytest

from tests.reliability import page
from tests.reliability.page import PAGE, ROOT, Row
from tests.reliability.trials import Trials


@pytest.mark.parametrize(("full", "count"), [(False, 2), (True, 5)])
def test_what_fails_is_counted_and_told(full: bool, count: int) -> None:
    trials = Trials(full)
    for number in trials(short=2, full=5):
        with trials.trial(number):
            assert number != 1
    assert trials.tried == count
    assert list(trials.failures) == [1]
    with pytest.raises(AssertionError, match=f"1 of {count} did not hold\ntrial 1: Traceback"):
        trials.settle()


def test_nothing_tried_is_no_success() -> None:
    with pytest.raises(AssertionError, match="nothing was tried"):
        Trials(full=False).settle()


def test_the_page_has_all_figures_and_their_sums() -> None:
    text = page.page([Row("a.py", "Killed merges resume", 50, 50), Row("b.py", "Files", 10, 9)])
    assert "| Killed merges resume | 50 | 50 |" in text
    assert text.endswith("| all | 60 | 59 |\n")


def test_new_figures_take_the_place_of_those_of_the_same_claim_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIGURES", "PAGE"):
        monkeypatch.setattr(page, name, tmp_path / name)
    page.FIGURES.write_text("[]")
    page.keep([Row("a.py", "Killed", 3, 2), Row("a.py", "Stopped", 3, 3)])
    page.keep([Row("a.py", "Killed", 50, 50)])
    assert page.kept() == [Row("a.py", "Killed", 50, 50), Row("a.py", "Stopped", 3, 3)]
    assert "| all | 53 | 53 |" in page.PAGE.read_text()


def test_every_claim_of_the_page_is_one_that_a_test_makes() -> None:
    """What is no longer tried, or tried under other words, is on the page no more."""
    rows = page.kept()
    assert PAGE.read_text("utf-8") == page.page(rows)
    for row in rows:
        assert row.claim in claims(row.file), f"take it from {page.FIGURES}: {row}"


def claims(file: str) -> set[str]:
    """First lines of the docstrings of a file's tests."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {(ast.get_docstring(test) or "").partition("\n")[0] for test in tests}
