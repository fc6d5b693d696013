"""Merges, and the first use of MLflow, that are killed or stopped at random moments."""

import json
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tests.reliability.commands import Blow, command
from tests.reliability.disturbed import STOPS, disturb
from tests.reliability.trials import Trials

SHARDS, SIDE = 60, 96
COUNTS = {"short": 3, "full": 50}


@dataclass(frozen=True)
class Merge:
    """`poemerge merge` of two experts, of many shards each."""

    sources: Path
    words = (
        *("merge", "--base", "base", "--expert", "a", "--expert", "b", "--out", "out"),
        *("--method", "gaussian_poe", "--device", "cpu"),
    )

    def fresh(self, folder: Path) -> None:
        shutil.copytree(self.sources, folder)

    def is_done(self, folder: Path) -> bool:
        out = folder / "out"
        if out.exists():
            assert dict(Lineage.find(out).outputs) == hash_files(out)
        return out.exists()

    def check(self, folder: Path, undisturbed: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {"base", "a", "b", "out"}
        for path in ("out/lineage.json", "out/merge_report.json"):
            assert (folder / path).read_bytes() == (undisturbed / path).read_bytes()
        assert hash_files(folder / "out") == hash_files(undisturbed / "out")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts of 60 shards each."""
    folder = tmp_path_factory.mktemp("kills") / "sources"
    for seed, name in enumerate(("base", "a", "b")):
        write_shards(folder / name, seed)
    return folder


def write_shards(folder: Path, seed: int) -> None:
    """A checkpoint of SHARDS files with two square matrices and a vector each."""
    folder.mkdir(parents=True)
    common, own = (torch.Generator().manual_seed(each) for each in (100, seed))
    placed = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        shapes = {"up": (SIDE, SIDE), "down": (SIDE, SIDE), "norm": (SIDE,)}
        tensors = {f"layers.{shard}.{name}.weight": shape for name, shape in shapes.items()}
        save_file(
            {
                name: torch.randn(shape, generator=common)
                + bool(seed) * 0.1 * torch.randn(shape, generator=own)
                for name, shape in tensors.items()
            },
            folder / file,
        )
        placed |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text("{}")


@pytest.mark.usefixtures("long")
def test_a_killed_first_use(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's database, killed while it is made, is made by the next command"""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # asked for: so it is made
    words, seconds = ("lineage", "models:/tiny/1"), 0.0
    for number in trials(short=1, full=50):
        folder = tmp_path / str(number)
        folder.mkdir()
        seconds = seconds or ask(words, tmp_path)
        with trials.trial(number):
            blow = Blow(signal.SIGKILL, random.Random(number).random() * seconds)
            assert command(words, folder, blow=blow).code in {1, -signal.SIGKILL}
            ask(words, folder)


def ask(words: tuple[str, ...], folder: Path) -> float:
    """Ask MLflow for a version that is not there; seconds that the answer took."""
    asked = command(words, folder)
    assert asked.code == 1
    assert "models:/tiny/1: it has no version" in asked.sentence, asked.said
    return asked.seconds


def test_a_killed_merge(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge killed at a random moment is gone on with, to the same bytes"""
    disturb(trials, COUNTS, Merge(sources), tmp_path, signal.SIGKILL)


def test_a_stopped_merge(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge stopped by Ctrl-C or SIGTERM at a random moment says how to go on, and does"""
    disturb(trials, COUNTS, Merge(sources), tmp_path, *STOPS)
