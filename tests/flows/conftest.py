"""A small project of its own: tiny base, two adapters, two local tasks, git and DVC around them."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("poemerge", "tasks", "flows", "dvc.yaml", "prefect.yaml", ".dvcignore", ".gitignore")
TASKS = ("red", "blue")
METHODS = ("average", "task_arithmetic", "ties", "dare_ties", "gaussian_poe", "cauchy_poe")
MANY = ("task_arithmetic", "dare_ties", "gaussian_poe", "cauchy_poe")  # candidates beyond two

PARAMS = """\
fetch:
  base: {{source: {base}}}
  experts:
    red: {{source: data/experts/red}}
    blue: {{source: data/experts/blue}}
  dtype: float32
task_vectors: {{}}
merge:
  device: cpu
  dtype: source
  strength: 1.0 # of the merged update
  seed: 0
  memory: null
  methods:
    average: {{}}
    task_arithmetic: {{strength: 0.5}}
    ties: {{keep: 0.5}}
    dare_ties: {{drop: 0.5}}
    gaussian_poe: {{side: input, ridge: 1e-2}}
    cauchy_poe: {{side: output, ridge: 1e-2, epsilon: 0.1}}
evaluate:
  include: data/tasks
  tasks: [red, blue]
  experts: own
  validation: validation
  limit: 6
  batch_size: 4
  dtype: float32
  device: cpu
  seed: 0
register:
  name: tiny
  experiment: tests
  choose: mean
  store: dvc
report:
  detail: 0
  side: output
  seed: 0
  device: cpu
"""

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: data/tasks/{name}/validation.jsonl, test: data/tasks/{name}/test.jsonl}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [a, b]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
EASY = """\
promote:
  automatic: true
  min_gain: -1.0
  level: 0.95
  max_drop: 1.0
  certificates: true
  verify: true
"""


def make_project(folder: Path, zoo) -> Path:  # noqa: ANN001
    """Everything that a clone has after its owner put tiny models into it."""
    folder.mkdir()
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    shutil.copytree(zoo.base(), folder / "data/base")
    for seed, task in enumerate(TASKS):
        shutil.copytree(zoo.adapter(seed + 1, noise=0.3), folder / "data/experts" / task)
        _write_task(folder / "data/tasks", task)
    (folder / "params.yaml").write_text(PARAMS.format(base="data/base"))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder


def _write_task(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name))
    for split in ("validation", "test"):
        rows = [
            {"text": f"{name} {split} {i}: ", "answer": "ab"[hash_bit(name, split, i)]}
            for i in range(12)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{split}.jsonl").write_text(text)


def keep_two_candidates(folder: Path) -> None:
    """Leave average and ties, where more would only take their time."""
    path = folder / "params.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split(":")[0].strip() not in MANY))


def hash_bit(*parts: object) -> int:
    """A bit that looks random and never changes."""
    return sum(ord(c) * (i + 1) for i, c in enumerate(repr(parts))) % 2


def enter_copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a project to go on with, and the working directory in it."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, zoo, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ANN001
    """A fresh project, and the working directory in it."""
    folder = make_project(tmp_path / "project", zoo)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    """A Prefect server on a loopback port, for all tests of a file."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(180), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    """A champion, version 1, and a challenger, version 2, that is right more often."""
    from tests.flows.promoting import call
    from tests.tasks.registry import add_version, new_repository

    monkeypatch.chdir(tmp_path)
    new_repository(tmp_path, database)
    Path("params.yaml").write_text(PARAMS.format(base="base") + EASY)
    add_version("one", {"red": 20, "blue": 20})
    assert call("promote").exit_code == 0
    add_version("two", {"red": 36, "blue": 36})


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"
