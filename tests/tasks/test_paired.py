"""Intervals of scores and of differences, on outcomes whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from poemerge.errors import SourceError
from tasks.paired import LEVEL, Outcomes, difference, score

CHANCES = {"red": 0.9, "blue": 0.6, "green": 0.3}  # of a right answer
ITEMS = 60


def outcomes(values: dict[str, np.ndarray]) -> Outcomes:
    """Outcomes on items that are numbered."""
    ids = {task: tuple(map(str, range(len(row)))) for task, row in values.items()}
    return Outcomes(ids, {task: tuple(map(float, row)) for task, row in values.items()})


def drawn(draw: np.random.Generator, gain: float = 0.0) -> dict[str, np.ndarray]:
    """Right and wrong answers, each right with its task's chance and what is gained."""
    return {t: draw.random(ITEMS) < chance + gain for t, chance in CHANCES.items()}


def correlated(draw: np.random.Generator, gain: float) -> tuple[Outcomes, Outcomes]:
    """Two candidates that find the same items hard; the second is better by `gain`."""
    luck = {task: draw.random(ITEMS) for task in CHANCES}
    own = draw.random(ITEMS) < 0.2  # items on which they are not alike
    first, second = {}, {}
    for task, chance in CHANCES.items():
        first[task] = luck[task] < chance
        second[task] = np.where(own, draw.random(ITEMS), luck[task]) < chance + gain
    return outcomes(first), outcomes(second)


def test_the_mean_is_over_tasks_not_items() -> None:
    found = score(outcomes({"red": np.ones(10), "blue": np.zeros(40)}))
    assert found.mean == 0.5


def test_the_interval_is_that_of_the_normal_limit() -> None:
    """With many items: mean ± z · sqrt(Σ p (1 - p) / n) / tasks, which needs no resampling."""
    draw = np.random.default_rng(0)
    values = {task: draw.random(4000) < chance for task, chance in CHANCES.items()}
    variance = sum(row.mean() * (1 - row.mean()) / len(row) for row in values.values())
    for level in (LEVEL, 0.99):
        found = score(outcomes(values), level=level)
        half = norm.ppf(0.5 + level / 2) * variance**0.5 / len(values)
        assert found.high - found.mean == pytest.approx(half, rel=0.05)
        assert found.mean - found.low == pytest.approx(half, rel=0.05)
        assert found.level == level


@pytest.mark.parametrize("what", ["score", "difference"])
def test_the_interval_holds_the_truth_as_often_as_it_says(what: str) -> None:
    draws = np.random.default_rng(1)
    held, runs = 0, 200
    for _ in range(runs):
        if what == "score":
            found, truth = score(outcomes(drawn(draws))), np.mean(list(CHANCES.values()))
        else:
            worse, better = correlated(draws, gain=0.05)
            found, truth = difference(better, worse), 0.05
        held += found.low <= truth <= found.high
    assert 0.90 <= held / runs <= 0.99  # 0.95, give or take three standard errors


def test_no_difference_is_seldom_real() -> None:
    draws = np.random.default_rng(2)
    pairs = [correlated(draws, gain=0.0) for _ in range(100)]
    assert sum(difference(left, right).is_real for left, right in pairs) <= 12


def test_pairing_shrinks_the_interval() -> None:
    draw = np.random.default_rng(3)
    worse, better = correlated(draw, gain=0.05)
    shuffled = {task: draw.permutation(row) for task, row in worse.values.items()}
    paired, apart = difference(better, worse), difference(better, outcomes(shuffled))
    assert paired.mean == pytest.approx(apart.mean)
    assert paired.high - paired.low < 0.6 * (apart.high - apart.low)


def test_a_difference_turned_round() -> None:
    left, right = correlated(np.random.default_rng(4), gain=0.1)
    there, back = difference(left, right), difference(right, left)
    assert there.mean == -back.mean
    assert there.low == pytest.approx(-back.high, abs=0.01)
    assert back.is_real
    assert back.low > 0


def test_other_items_or_tasks_are_refused() -> None:
    left = outcomes(drawn(np.random.default_rng(5)))
    moved = Outcomes({**left.ids, "blue": left.ids["blue"][::-1]}, left.values)
    fewer = Outcomes({"red": left.ids["red"]}, {"red": left.values["red"]})
    for one, other, task in ((left, moved, "blue"), (left, fewer, "blue"), (fewer, left, "blue")):
        with pytest.raises(SourceError, match=f"other items of {task}"):
            difference(one, other)


def test_outcomes_that_never_vary() -> None:
    same = outcomes({"red": np.ones(5), "blue": np.ones(7)})
    assert score(same).low == score(same).high == score(same).mean == 1.0
    found = difference(same, same)
    assert (found.low, found.mean, found.high) == (0, 0, 0)
    assert not found.is_real
    better = difference(same, outcomes({"red": np.zeros(5), "blue": np.zeros(7)}))
    assert better.is_real


def test_one_item_has_no_interval() -> None:
    with pytest.raises(SourceError, match="Task red has 1 item"):
        score(outcomes({"red": np.ones(1)}))


def test_the_seed_decides_the_resamples() -> None:
    values = outcomes({"red": np.random.default_rng(6).random(ITEMS)})
    assert score(values, seed=1) == score(values, seed=1)
    assert score(values, seed=1) != score(values, seed=2)


def test_reading_what_an_evaluation_left(tmp_path: Path) -> None:
    items = {"red": {"test": {"ids": ["a", "b"], "outcomes": [1, 0.5]}}}
    (tmp_path / "items.json").write_text(json.dumps(items))
    read = Outcomes.read(tmp_path, ["red"], "test")
    assert read == Outcomes({"red": ("a", "b")}, {"red": (1.0, 0.5)})
    for tasks, split in ((["red"], "validation"), (["blue"], "test")):
        with pytest.raises(SourceError, match=r"items\.json lacks items"):
            Outcomes.read(tmp_path, tasks, split)
