"""The search by itself: real Optuna studies on scores that are made up by a formula."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pytest

from poemerge.errors import SettingError
from poemerge.methods import find
from tasks.paired import Outcomes
from tasks.sweep.search import Result, Rules, Search, open_storage
from tasks.sweep.space import Range, Space
from tasks.sweep.standings import Winner, as_json, rank

TASKS = ("red", "green", "blue")
LISTS = {"keep": [0.1, 0.2, 0.4], "strength": [0.5, 1.0]}
RANGES = {"keep": {"low": 0.01, "high": 1.0, "log": True}, "strength": {"low": 0.0, "high": 2.0}}
Score = Callable[[Mapping[str, Any], str], float]


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    """In memory, where nothing is about the file."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.InMemoryStorage()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[optuna.storages.BaseStorage]:
    with open_storage(tmp_path / "optuna.db") as opened:
        yield opened


def rules(sampler: str = "grid", trials: int = 12, *, prune: bool = False, seed: int = 0) -> Rules:
    return Rules(sampler, trials, prune, seed, len(TASKS))


def score(settings: Mapping[str, Any], _task: str) -> float:
    """Best at keep 0.2, strength 1."""
    return 1 - abs(settings["keep"] - 0.2) / 2 - abs(settings["strength"] - 1) / 8


def run(search: Search, score: Score = score, stop: int | None = None) -> list[Result]:
    """Go through a search; `stop`: candidates after which it is left in the midst of the next."""
    for count in itertools.count():
        trial = search.ask()
        if trial is None:
            return search.results
        for task in TASKS:
            pruned = trial.report(task, score(trial.settings, task))
            if pruned or count == stop:
                break
        if count == stop:
            return search.results
        trial.finish("pruned" if pruned else "complete")
    raise AssertionError


def settings(results: list[Result]) -> list[Mapping[str, Any]]:
    return [result.settings for result in results]


def test_a_grid_covers_the_product_and_finds_the_best(storage: Any) -> None:
    search = Search(storage, "a", Space.parse("ties", LISTS), rules())
    product = [{"keep": k, "strength": s} for k in LISTS["keep"] for s in LISTS["strength"]]
    assert search.left == search.total == len(product)
    assert settings(run(search)) == product
    assert search.best.settings == {"keep": 0.2, "strength": 1.0}
    assert search.best.mean == pytest.approx(1.0)
    assert search.left == 0


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_seed_decides_the_candidates(storage: Any, sampler: str) -> None:
    space = Space.parse("ties", RANGES)
    first, again, other = (
        settings(run(Search(storage, name, space, rules(sampler, seed=seed))))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other
    assert len({str(each) for each in first}) == 12


def test_tpe_learns(storage: Any) -> None:
    space = Space.parse("ties", RANGES)

    def late_mean(sampler: str, seed: int) -> float:
        how = rules(sampler, 25, seed=seed)
        return fmean(r.mean for r in run(Search(storage, f"{sampler} {seed}", space, how))[10:])

    found = {name: fmean(late_mean(name, seed) for seed in range(5)) for name in ("random", "tpe")}
    assert found["tpe"] > found["random"] + 0.02


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
@pytest.mark.parametrize("prune", [True, False])
def test_a_stopped_search_ends_like_one_that_never_was(
    file: Any, sampler: str, *, prune: bool
) -> None:
    space = Space.parse("ties", LISTS if sampler == "grid" else RANGES)
    how = rules(sampler, 8, prune=prune)
    whole = run(Search(file, "whole", space, how))
    for stop in (0, 2, 1):
        run(Search(file, "stopped", space, how), stop=stop)
    resumed = Search(file, "stopped", space, how)
    assert len(resumed.results) == 3
    ended = run(resumed)
    assert [(r.settings, r.state, r.scores) for r in ended] == [
        (r.settings, r.state, r.scores) for r in whole
    ]


def test_a_result_that_optuna_was_not_told_counts(storage: Any) -> None:
    """The process was killed between two writes."""
    space = Space.parse("ties", {"keep": [0.1, 0.2]})
    trial = Search(storage, "a", space, rules()).ask()
    result = Result({"keep": 0.1}, dict.fromkeys(TASKS, 0.5), 1.0, "", "complete")
    trial._trial.set_user_attr("result", asdict(result))
    search = Search(storage, "a", space, rules())
    assert search.results == [result]
    assert search.study.trials[0].value == 0.5
    assert search.ask().settings == {"keep": 0.2}


def test_more_trials_go_on(storage: Any) -> None:
    space = Space.parse("ties", RANGES)
    few = settings(run(Search(storage, "a", space, rules("tpe", 4))))
    more = settings(run(Search(storage, "a", space, rules("tpe", 9))))
    assert more[:4] == few
    assert len(more) == 9


def test_a_small_space_is_exhausted_early(storage: Any) -> None:
    search = Search(storage, "a", Space.parse("ties", {"keep": [0.1, 0.2]}), rules("random", 100))
    results = run(search, lambda s, _: s["keep"])
    assert {r.settings["keep"] for r in results} == {0.1, 0.2}
    assert len(results) < 100
    assert search.left == 0
    for sampler in ("grid", "random", "tpe"):
        alone = Search(storage, sampler, Space.parse("average", {}), rules(sampler))
        assert settings(run(alone, lambda *_: 1.0)) == [{}]


def test_the_median_prunes_by_the_tasks_that_are_done(storage: Any) -> None:
    """The fourth is behind on the second task, whatever its first one was worth."""
    scores = {0.1: (0.9, 0.5, 0.5), 0.2: (0.9, 0.6, 0.5), 0.3: (0.9, 0.7, 0.5)}
    scores |= {0.4: (0.95, 0.1, 0.9), 0.5: (0.9, 0.65, 0.1)}
    space = Space.parse("ties", {"keep": list(scores)})
    search = Search(storage, "a", space, rules(prune=True))
    results = run(search, lambda s, task: scores[s["keep"]][TASKS.index(task)])
    assert [result.state for result in results] == [*["complete"] * 3, "pruned", "complete"]
    assert [len(result.scores) for result in results] == [3, 3, 3, 2, 3]
    kept = Search(storage, "b", space, rules(prune=False))
    assert {r.state for r in run(kept, lambda s, _: s["keep"])} == {"complete"}


def test_a_refused_candidate_is_not_tried_again(storage: Any) -> None:
    space = Space.parse("ties", {"keep": [0.1, 0.2]})
    Search(storage, "a", space, rules()).ask().finish("refused", "it was singular")
    search = Search(storage, "a", space, rules())
    results = run(search, lambda s, _: s["keep"])
    assert [(r.settings["keep"], r.state) for r in results] == [(0.1, "refused"), (0.2, "complete")]
    assert results[0].refused == "it was singular"
    assert search.best.settings == {"keep": 0.2}


def test_two_sweeps_at_once_are_refused(tmp_path: Path, file: Any) -> None:
    code = f"""
from pathlib import Path
from poemerge.errors import SettingError
from tasks.sweep.search import open_storage
try:
    with open_storage(Path({str(tmp_path / "optuna.db")!r})):
        print("both")
except SettingError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Another sweep is at")


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optuna.db").write_text("no database, but a text of some length" * 100)
    with (
        pytest.raises(SettingError, match=r"set sweep\.storage"),
        open_storage(tmp_path / "optuna.db"),
    ):
        pass


def test_numbers_of_a_range_are_short_and_inside() -> None:
    wide = Range.parse({"low": 0.0123456, "high": 0.9996}, whole=False)
    assert wide.read(0.123456) == 0.123
    assert wide.read(0.9996) == 0.9996
    assert wide.read(0.0123456) == 0.0123456
    whole = Space.parse("cauchy_poe", {"max_steps": {"low": 10, "high": 50, "step": 10}})
    assert whole.settings({"max_steps": 30}) == {"max_steps": 30}
    assert isinstance(whole.domains["max_steps"].read(30.0), int)


def test_values_of_every_kind_come_back(storage: Any) -> None:
    given = {"method": "student_t_poe", "nu": [2.0, "estimated"], "side": "output"}
    given |= {"weights": [{"red": 2.0}, {}]}
    space = Space.parse("mine", given)
    assert space.method == "student_t_poe"
    found = settings(run(Search(storage, "a", space, rules()), lambda *_: 1.0))
    assert found == [
        {"nu": nu, "side": "output", "weights": weights}
        for nu in (2.0, "estimated")
        for weights in ({"red": 2.0}, {})
    ]
    for each in found:
        find(space.method).settings.parse(each)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": []}, "keep is an empty list"),
        ({"keep": {"low": 0.1, "hihg": 1}}, "a range with low and high"),
        ({"keep": {"low": 0.1}}, "a range with low and high"),
        ({"keep": {"low": 1, "high": 0.1}}, "low lies below high"),
        ({"keep": {"low": 0, "high": 1, "log": True}}, "above 0 with log"),
        ({"keep": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "without log"),
        ({"keep": {"low": "a", "high": 1}}, "give numbers"),
        ({"method": "cauchy_poe", "max_steps": {"low": 1.5, "high": 3}}, "whole numbers"),
        ({"method": "tise"}, "did you mean 'ties'?"),
    ],
)
def test_what_is_no_space(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        Space.parse("ties", given)
    assert words in str(caught.value)


def winner(label: str, validation: float, right: int) -> Winner:
    """A winner with `right` of 40 items right on each task of test."""
    values = {task: tuple([1.0] * right + [0.0] * (40 - right)) for task in TASKS}
    ids = {task: tuple(map(str, range(40))) for task in TASKS}
    scores = dict.fromkeys(TASKS, right / 40)
    return Winner(label, "ties", {}, label, validation, {}, scores, Outcomes(ids, values), 1)


def test_differences_are_taken_to_the_best_on_validation() -> None:
    standings = rank([winner("a", 0.5, 20), winner("b", 0.7, 30), winner("c", 0.6, 31)])
    assert [standing.winner.label for standing in standings] == ["b", "c", "a"]
    assert [s.verdict for s in standings] == ["best on validation", "not distinguishable", "real"]
    gaps = [standing.gap for standing in standings[1:]]
    assert [gap.mean for gap in gaps] == pytest.approx([1 / 40, -10 / 40])
    assert all(gap.level == 0.975 for gap in gaps)  # two hold together in 95 %
    board = as_json(standings, TASKS)
    assert board["best"] == "b"
    assert [row["test"]["mean"] for row in board["rows"]] == pytest.approx([0.75, 0.775, 0.5])
    assert rank([winner("a", 0.5, 20)])[0].gap is None
