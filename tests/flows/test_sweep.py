"""A whole sweep for real: Prefect, Optuna, lm-eval and MLflow on tiny models.

Answers are planted: they are what the merge of strength 0.5 says, so that it is the best there is.
"""

import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.cli import main
from flows.params import load
from flows.sweep import sweep
from poemerge.alone import LOCK
from poemerge.errors import SettingError
from poemerge.hashing import digest
from tasks.paired import Outcomes, difference
from tests.flows.conftest import ROOT, TASKS
from tests.flows.planted import ITEMS, SWEEP, board_of, plant, runs, stop, write

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    """A project in which strength 0.5 is right on every item; nothing has been run in it."""
    return plant(tmp_path_factory.mktemp("sweep") / "project", zoo)


@pytest.fixture(scope="module")
def finished(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The project after its sweep; for reading only."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(planted, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return folder, sweep()
    finally:
        os.chdir(before)


@pytest.fixture
def done(finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to go on with, and the working directory in it."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fresh(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in which nothing has been run, and the working directory in it."""
    folder = tmp_path / "project"
    shutil.copytree(planted, folder)
    monkeypatch.chdir(folder)
    return folder


def test_the_planted_best_is_found(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    assert outcome["winners"] == {
        "task_arithmetic": {"strength": 0.5},
        "half": {"method": "average", "strength": 1.0},  # of two experts: the same merge
    }
    rows = {row["label"]: row for row in board_of(folder, outcome)["rows"]}
    assert rows["task_arithmetic"]["validation"] == rows["task_arithmetic"]["test"]["mean"] == 1.0
    assert rows["task_arithmetic"]["counts"] == {"complete": 3, "pruned": 1, "refused": 0}
    assert rows["half"]["counts"] == {"complete": 2, "pruned": 0, "refused": 0}
    assert rows["half"]["gap"]["mean"] == 0
    assert rows["half"]["verdict"] == "not distinguishable"


def test_a_bad_candidate_costs_fewer_tasks(finished: tuple[Path, dict]) -> None:
    folder, _ = finished
    scored = [
        set(json.loads((each / "items.json").read_text()))
        for each in (folder / ".poemerge/sweep/scores").iterdir()
    ]
    assert sorted(map(len, scored)) == [1, 2, 2, 2, 2, 2]
    assert {"red"} in scored


def test_test_is_looked_at_once_a_method(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    items = {
        path: json.loads(path.read_text())
        for path in (folder / ".poemerge/sweep").rglob("items.json")
    }
    tested = [p for p, of in items.items() if any("test" in splits for splits in of.values())]
    assert sorted(p.parts[-3] for p in tested) == ["half", "task_arithmetic"]
    assert {row["looks"] for row in board_of(folder, outcome)["rows"]} == {1}
    for row in board_of(folder, outcome)["rows"]:
        assert (folder / ".poemerge/sweep/scores" / row["key"] / "items.json").exists()


def test_gaps_are_those_of_the_items(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    best, other = board_of(folder, outcome)["rows"]
    both = [
        Outcomes.read(folder / outcome["folder"] / "test" / r["label"] / r["key"], TASKS, "test")
        for r in (other, best)
    ]
    assert other["gap"]["low"] == difference(*both).low
    assert other["test"]["mean"] == pytest.approx(
        sum(map(sum, both[0].values.values())) / len(TASKS) / ITEMS
    )


def test_no_model_and_no_clock_is_left(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    assert not list((folder / ".poemerge/sweep").rglob("*.safetensors"))
    assert "second" not in (folder / outcome["folder"] / "sweep.json").read_text()
    log = json.loads((folder / outcome["folder"] / "log.json").read_text())
    assert all(log[label] > 0 for label in ("task_arithmetic", "half"))


def test_every_trial_is_a_run_below_the_sweep(finished: tuple[Path, dict]) -> None:
    (parent,), below = runs(finished[0])
    assert parent.info.run_name == "sweep"
    assert parent.info.status == "FINISHED"
    assert [run.info.run_name for run in below["trial"]] == [
        *(f"task_arithmetic {k}" for k in (1, 2, 3, 4)), "half 1", "half 2",
    ]  # fmt: skip
    states = [run.data.tags["poemerge.state"] for run in below["trial"]]
    assert states == [*["complete"] * 3, "pruned", *["complete"] * 2]
    planted, pruned = below["trial"][1], below["trial"][3]
    assert planted.data.params == {"method": "task_arithmetic", "strength": "0.5"}
    assert {m: planted.data.metrics[f"validation/{m}"] for m in (*TASKS, "mean")} == {
        "red": 1, "blue": 1, "mean": 1,
    }  # fmt: skip
    assert "validation/blue" not in pruned.data.metrics
    assert [run.data.metrics["test/mean"] for run in below["winner"]] == [1, 1]


def test_a_finished_sweep_has_nothing_to_do(
    done: Path, finished: tuple[Path, dict], caplog: pytest.LogCaptureFixture
) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.rglob("items.json")}
    scored = next(done.glob(".poemerge/sweep/scores/*"))
    lock = scored.with_name(f"{scored.name}{LOCK}")
    lock.write_text("process 1, killed once this was scored")
    caplog.set_level(logging.INFO)
    assert sweep() == finished[1]
    assert not lock.exists()
    assert not [r for r in caplog.records if ", validation:" in r.message or ", test:" in r.message]
    assert {p: p.stat().st_mtime_ns for p in done.rglob("items.json")} == before
    (parent,), below = runs(done)
    assert parent.info.status == "FINISHED"
    assert (len(below["trial"]), len(below["winner"])) == (6, 2)


def test_another_space_reuses_scores_and_another_input_does_not(
    done: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tasks.evaluate")
    space = ["sweep.space={task_arithmetic: {strength: [0.5, 0.6]}}"]
    sweep(overrides=space)
    scored = [r.message.split(":")[0] for r in caplog.records if "validation" in r.message]
    assert scored == [f"task_arithmetic on {task}, validation" for task in TASKS]  # of 0.6
    caplog.clear()
    write(done, "red", "validation", ["a"] * ITEMS)
    sweep(overrides=space)
    scored = [r.message.split(":")[0] for r in caplog.records if "validation" in r.message]
    assert len(scored) == 4
    assert len(runs(done)[0]) == 3


def test_one_method_alone(fresh: Path) -> None:
    assert sweep(labels=["half"])["winners"].keys() == {"half"}
    assert not list(fresh.glob(".poemerge/sweep/*/test/task_arithmetic"))
    outcome = sweep(labels=["task_arithmetic"])
    assert outcome["winners"].keys() == {"task_arithmetic", "half"}
    assert len(runs(fresh)[0]) == 1


def test_a_merge_that_is_refused_ends_no_sweep(fresh: Path) -> None:
    """Fisher information is asked for, and there are no files of it."""
    space = "{gaussian_poe: {precision: [diagonal, gram]}}"
    outcome = sweep(overrides=[f"sweep.space={space}"])
    (row,) = board_of(fresh, outcome)["rows"]
    assert row["counts"] == {"complete": 1, "pruned": 0, "refused": 1}
    assert row["settings"] == {"precision": "gram"}
    _, below = runs(fresh)
    assert "curvature" in below["trial"][0].data.tags["poemerge.refused"]


def test_what_was_stopped_is_gone_on_with(
    fresh: Path, finished: tuple[Path, dict], caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "hold").touch()
    code, said = stop(fresh, signal.SIGINT)
    assert code == 3
    assert "interrupted: run the same command again to go on." in said
    code, _ = stop(fresh, signal.SIGKILL)
    assert code == -signal.SIGKILL
    (fresh / "hold").unlink()

    caplog.set_level(logging.INFO, "tasks.evaluate")
    outcome = sweep()
    assert board_of(fresh, outcome) == board_of(*finished)
    scored = [r.message.split(":")[0] for r in caplog.records if "validation" in r.message]
    # Of 6 candidates on 2 tasks each, the first and the second's red were there; one is pruned.
    assert len(scored) == 12 - 3 - 1
    assert scored[0] == "task_arithmetic on blue, validation"
    (parent,), below = runs(fresh)
    assert parent.info.status == "FINISHED"
    ended = [(run.info.run_name, run.info.status) for run in below["trial"]]
    assert ended[:4] == [
        ("task_arithmetic 1", "FINISHED"),
        *[("task_arithmetic 2", "KILLED")] * 2,
        ("task_arithmetic 2", "FINISHED"),
    ]
    assert {status for _, status in ended[3:]} == {"FINISHED"}
    assert len(ended) == 6 + 2


def test_the_command_shows_and_saves(done: Path) -> None:
    shown = CliRunner().invoke(main, ["sweep", "--save"], catch_exceptions=False)
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    for words in ("task_arithmetic", "strength=0.5", "100.0", "3 complete, 1 pruned",
                  "not distinguishable", "task_arithmetic: {strength: 0.5}"):  # fmt: skip
        assert words in text
    text = (done / "params.yaml").read_text()
    assert "# of the merged update" in text
    assert "# no stage" in text
    methods = load(done / "params.yaml").merge.methods
    assert methods["task_arithmetic"] == {"strength": 0.5}
    assert methods["half"] == {"method": "average", "strength": 1.0}
    assert methods["ties"] == {"keep": 0.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.space.half.strength={low: 0.1, high: 1}", "has a range, which a grid cannot cover"),
        ("sweep.trials=3", "has 4 combinations where sweep.trials allows 3"),
        ("sweep.space.ties={kep: [0.1]}", "Unknown setting 'kep' (did you mean 'keep'?)"),
        ("sweep.space.ties={keep: [0.1, 7]}", "keep is 7; it must be between 0 and 1"),
        ("sweep.space.tise={keep: [0.1]}", "Unknown method 'tise' (did you mean 'ties'?)"),
        ("sweep.space.ties={keep: []}", "sweep.space.ties: keep is an empty list"),
        ("sweep.space.ties={weights: {rad: 2}}", "names 'rad' (did you mean 'red'?)"),
        ("sweep.sampler=cmaes", "sweep.sampler"),
        ("sweep.trails=3", "unknown key sweep.trails (did you mean 'trials'?)"),
        ("sweep=null", "has no section sweep"),
        ("evaluate.limit=1", "evaluate.limit is 1"),
    ],
)
def test_what_is_refused_and_how(
    planted: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    monkeypatch.chdir(planted)
    with pytest.raises(SettingError) as caught:
        sweep(overrides=[override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (planted / ".poemerge").exists()


def test_the_section_in_the_docs_is_accepted(planted: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweep.md").read_text(), re.DOTALL)
    path = tmp_path / "params.yaml"
    path.write_text((planted / "params.yaml").read_text().replace(SWEEP, "\n" + block))
    assert load(path).sweep.space.keys() == {"average", "ties", "cauchy_poe", "written_side"}


def test_a_label_that_is_not_there(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(planted)
    with pytest.raises(SettingError, match="did you mean 'half'"):
        sweep(labels=["hall"])


def test_a_sweep_moves_no_output_of_a_run(planted: Path) -> None:
    with_it, without = (load(planted / "params.yaml", o) for o in ([], ["sweep=null"]))
    assert digest(with_it.sections) == digest(without.sections)
