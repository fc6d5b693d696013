"""A project in which a sweep has a planted best, what holds it there, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL

from poemerge.merge import merge_checkpoints
from tasks.evaluate import evaluate
from tasks.tracking import connected
from tests.flows.conftest import TASKS, make_project

ITEMS = 40
SWEEP = """
sweep: # no stage
  sampler: grid
  trials: 6 # at most
  prune: true
  seed: 0
  storage: .poemerge/sweep/optuna.db
  space:
    task_arithmetic: {strength: [0.45, 0.5, 0.55, 9.0]}
    half: {method: average, strength: [1.0, 0.9]}
"""
# A task may run code. This one holds the second candidate on blue, if it is told to.
GATE = """
import time
from pathlib import Path

def text(doc):
    scores = [p for p in Path(".poemerge/sweep/scores").glob("*") if p.suffix != ".partial"]
    if Path("hold").exists() and len(scores) > 1:
        Path("held").touch()
        time.sleep(600)
    return doc["text"]
"""


def plant(folder: Path, zoo) -> Path:  # noqa: ANN001
    """A project in which strength 0.5 is right on every item; nothing has been run in it."""
    make_project(folder, zoo)
    params = (folder / "params.yaml").read_text().replace("limit: 6", f"limit: {ITEMS}") + SWEEP
    (folder / "params.yaml").write_text(params)
    (folder / "data/tasks/gate.py").write_text(GATE)
    merged = folder.parent / "planted"
    experts = {task: folder / "data/experts" / task for task in TASKS}
    merge_checkpoints(folder / "data/base", experts, merged, "task_arithmetic", "cpu", strength=0.5)
    path = folder / "data/tasks/blue.yaml"
    path.write_text(path.read_text().replace('"{{text}}"', "!function gate.text"))
    for task in TASKS:
        for split in ("validation", "test"):
            write(folder, task, split, ["a"] * ITEMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with connected():  # a database that is made once is made once
            said = outcomes_of(folder, merged)
    for task, cells in said.items():
        for split, cell in cells.items():
            write(folder, task, split, ["a" if right else "b" for right in cell["outcomes"]])
    return folder


def write(folder: Path, task: str, split: str, answers: list[str]) -> None:
    rows = [{"text": f"{task} {split} {i}: ", "answer": answer} for i, answer in enumerate(answers)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data/tasks" / task / f"{split}.jsonl").write_text(text)


def outcomes_of(folder: Path, merged: Path) -> dict[str, Any]:
    """What the evaluate stage finds of a merge, item by item."""
    out = folder.parent / "scored"
    how = {"limit": None, "batch_size": 4, "dtype": "float32", "device": "cpu", "seed": 0}
    splits = {"splits": ["validation", "test"], "validation": "validation"}
    include = folder / "data/tasks"
    evaluate.fn(
        "it", "merge", folder / "data/base", merged, out, tasks=TASKS, include=include,
        trust=[include], **how, **splits,
    )  # fmt: skip
    return json.loads((out / "items.json").read_text())


def board_of(folder: Path, outcome: dict) -> dict[str, Any]:
    return json.loads((folder / outcome["folder"] / "sweep.json").read_text())


def runs(folder: Path) -> tuple[list[Any], dict[str, list[Any]]]:
    """The sweeps' runs, and those below them by their kind."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (place,) = [e.experiment_id for e in client.search_experiments() if e.name == "tests"]
    parents, below = [], {"trial": [], "winner": []}
    for run in client.search_runs([place], order_by=["attributes.start_time ASC"]):
        if "mlflow.parentRunId" in run.data.tags:
            assert run.data.tags["mlflow.parentRunId"] in {p.info.run_id for p in parents}
            below[run.data.tags["poemerge.kind"]].append(run)
        else:
            parents.append(run)
    return parents, below


def stop(folder: Path, blow: signal.Signals) -> tuple[int, str]:
    """Run the command in a process that is stopped in the midst of the second candidate."""
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "sweep"],
        cwd=folder, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "held").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(blow)
    _, said = process.communicate(timeout=300)
    (folder / "held").unlink()
    return process.returncode, said
