"""The instrument itself: a claim that does not hold is counted, told, and fails its test."""

import pytest

from tests.reliability.page import Row, page
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
    text = page([Row("a.py", "Killed merges resume", 50, 50), Row("b.py", "Files", 10, 9)])
    assert "| Killed merges resume | 50 | 50 |" in text
    assert text.endswith("| all | 60 | 59 |\n")
