import json
from pathlib import Path

import pytest

from poemerge.errors import SourceError
from tasks.register.heatmap import heatmap
from tasks.register.leaderboard import (
    Choice,
    Cost,
    Kind,
    Leaderboard,
    Scores,
    leaderboard,
    read_costs,
    read_scores,
)

TASKS = ("odd", "even")
Pair = tuple[float | None, float | None]  # a score for each task


def cells(test: Pair, validation: Pair | None = None) -> Scores:
    """Task → split → cell, from scores in task order."""
    splits = {"test": test} | ({"validation": validation} if validation else {})
    return {
        task: {
            split: {"metric": "acc", "score": scores[i], "stderr": 0.05, "items": 40}
            for split, scores in splits.items()
        }
        for i, task in enumerate(TASKS)
        if all(scores[i] is not None for scores in splits.values())
    }


def board(choose: Choice = "mean") -> Leaderboard:
    """On validation `ties` has the better mean and `average` keeps more of the weaker expert."""
    scores = {
        ("base", "base"): cells((0.25, 0.25)),
        ("expert", "odd"): cells((0.8, None)),
        ("expert", "even"): cells((None, 0.4)),
        ("merge", "average"): cells((0.4, 0.4), (0.4, 0.4)),
        ("merge", "ties"): cells((0.8, 0.1), (0.8, 0.1)),
        ("merge", "twin"): cells((0.8, 0.1), (0.8, 0.1)),
    }
    return leaderboard(scores, TASKS, choose)


def test_mean_is_over_tasks_and_normalised_over_experts() -> None:
    ties = board().of("merge")[0]
    assert ties.mean == pytest.approx({"validation": 0.45, "test": 0.45})
    assert ties.normalised == pytest.approx({"validation": 0.625, "test": 0.625})


def test_an_expert_has_neither_mean_nor_normalised() -> None:
    assert all(not row.mean and not row.normalised for row in board().of("expert"))


def test_an_expert_that_was_scored_on_all_tasks_has_both() -> None:
    scores = {
        ("expert", "odd"): cells((0.8, 0.2)),
        ("expert", "even"): cells((None, 0.4)),
        ("merge", "ties"): cells((0.8, 0.1), (0.8, 0.1)),
    }
    odd, even = leaderboard(scores, TASKS, "mean").of("expert")
    assert odd.mean == {"test": 0.5}
    assert odd.normalised == {"test": pytest.approx(0.75)}
    assert not even.mean


@pytest.mark.parametrize(("choose", "best"), [("mean", "ties"), ("normalised", "average")])
def test_validation_chooses(choose: Choice, best: str) -> None:
    assert board(choose).best.label == best


def test_the_test_split_does_not_choose() -> None:
    scores = {
        ("merge", "lucky"): cells((0.9, 0.9), (0.2, 0.2)),
        ("merge", "sound"): cells((0.3, 0.3), (0.3, 0.3)),
    }
    assert leaderboard(scores, TASKS, "mean").best.label == "sound"


def test_equals_keep_the_given_order() -> None:
    assert [row.label for row in board().rows] == ["base", "odd", "even", "ties", "twin", "average"]


def test_a_useless_expert_does_not_normalise() -> None:
    scores = {
        ("expert", "odd"): cells((0.0, None)),
        ("expert", "even"): cells((None, 0.5)),
        ("merge", "average"): cells((0.4, 0.4), (0.4, 0.4)),
    }
    assert leaderboard(scores, TASKS, "normalised").best.normalised["test"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("scores", "choose", "match"),
    [
        ({("base", "base"): cells((0.2, 0.2))}, "mean", "no merge to register"),
        ({("merge", "ties"): cells((0.2, 0.2), (0.2, 0.2))}, "normalised", "choose to mean"),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    scores: dict[tuple[Kind, str], Scores], choose: Choice, match: str
) -> None:
    with pytest.raises(SourceError, match=match):
        leaderboard(scores, TASKS, choose)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.json"
    path.write_text(json.dumps(board().as_json()))
    assert Leaderboard.read(path) == board()
    assert json.loads(path.read_text())["best"] == "ties"


def test_a_missing_leaderboard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="run the register stage"):
        Leaderboard.read(tmp_path / "leaderboard.json")


@pytest.mark.parametrize(
    "text", ["", "{}", '{"scores": {"odd": {"test": {}}}}', '{"scores": {"odd": {"test": 1}}}']
)
def test_unusable_results_name_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SourceError, match=r"results\.json lacks a score .*run evaluate again"):
        read_scores(tmp_path, ("odd",), ("test",))


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"scores": {"odd": {"test": {"score": NaN}}}}')
    with pytest.raises(SourceError, match="not finite"):
        read_scores(tmp_path, ("odd",), ("test",))


def test_costs_are_read_where_they_are_there(tmp_path: Path) -> None:
    log = tmp_path / "merge-ties.json"
    log.write_text('{"seconds": 12.34, "peak_bytes": 1073741824, "device": "cpu"}')
    costs = read_costs({"ties": str(log), "average": str(tmp_path / "none.json")})
    assert costs == {"ties": Cost(12.34, 2**30), "average": Cost()}


def test_heatmap_has_every_known_score(tmp_path: Path) -> None:
    figure = heatmap(board())
    figure.savefig(tmp_path / "board.png")
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == [
        *("25.0", "25.0", "25.0"),  # base
        *("80.0", "40.0", "60.0"),  # the experts, each on its own task
        *("80.0", "10.0", "45.0", "80.0", "10.0", "45.0", "40.0", "40.0", "40.0"),
    ]
