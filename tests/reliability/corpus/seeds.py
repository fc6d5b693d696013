"""What is sound: made once, copied for every case, and spoiled there."""

import json
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from poemerge.atomic import write_json
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage, Source
from poemerge.merge import merge_checkpoints
from poemerge.statistics import describe_task_vectors
from tests.flows.conftest import PARAMS, TASK
from tests.reliability.corpus.records import old_format
from tests.tasks import test_fetch_gguf as ggufs
from tests.zoo import Zoo

MORE = """\
sweep:
  sampler: random
  trials: 4
  prune: true
  seed: 0
  storage: sqlite:///sweep.db
  space: {ties: {keep: {low: 0.1, high: 0.9}}, average: {strength: [0.5, 1.0]}}
schedule: {cron: "0 2 * * *", timezone: UTC, timeout: null}
promote:
  {automatic: true, min_gain: 0.0, level: 0.95, max_drop: 0.1, certificates: true, verify: true}
"""


def checkpoints(folder: Path, zoo: Zoo) -> None:
    """Bases, experts and what `poemerge experts add` needs around them."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*k_proj": 3}}
    for name, made in {
        "base": zoo.base(),
        "base-sharded": zoo.base(sharded=True),
        "full": zoo.full(1),
        "full-sharded": zoo.full(2, sharded=True),
        "adapter": zoo.adapter(1),
        "adapter-patterns": zoo.adapter(2, **patterns),
    }.items():
        shutil.copytree(made, folder / name)


def models(folder: Path) -> None:
    """A merge of a merge, with its record in both formats, and signed."""
    with chdir(folder):  # addresses in a record are as they were written
        merge_checkpoints("base", {"law": "full"}, "first", "average", device="cpu")
        experts = {"law": "full", "first": "first"}
        merge_checkpoints("base", experts, "model", "gaussian_poe", device="cpu")
        shutil.copytree("model", "model-format-1")
        old_format(Path("model-format-1"))


def signature(folder: Path) -> None:
    """Of the model, and the key that it holds for."""
    from tasks.provenance.sign import sign

    with chdir(folder):
        make = ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "key"]
        subprocess.run(make, check=True, capture_output=True)
        show = ["openssl", "ec", "-in", "key", "-pubout", "-out", "key.pub"]
        subprocess.run(show, check=True, capture_output=True)
        sign(Path("model"), Path("key"), Path("model.sig"))


def library(folder: Path, database: Path) -> None:
    """What a library of experts is kept in."""
    with chdir(folder):
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
        shutil.copyfile(database, "mlflow.db")


def quantised(folder: Path) -> None:
    """Two .gguf files."""
    torch.manual_seed(0)
    model: LlamaForCausalLM = ggufs.tiny()
    ggufs.write(folder / "tiny.gguf", model)
    ggufs.write(folder / "tiny-q8.gguf", model, quantised=True)


def parameters(folder: Path) -> None:
    """A params.yaml, and one with the sections of all commands."""
    text = PARAMS.format(base="data/base")
    (folder / "params.yaml").write_text(text)
    (folder / "params-more.yaml").write_text(text + MORE)


def tasks(folder: Path) -> None:
    """A task of lm-eval that includes another file, with its data."""
    (folder / "tasks/red").mkdir(parents=True)
    text = TASK.format(name="red").replace("data/tasks/", "")
    head, _, rest = text.partition("dataset_path")
    (folder / "tasks/common.yaml").write_text("dataset_path" + rest)
    (folder / "tasks/red.yaml").write_text(head + "include: common.yaml\n")
    for split in ("validation", "test"):
        rows = [{"text": f"red {split} {i}: ", "answer": "ab"[i % 2]} for i in range(6)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"tasks/red/{split}.jsonl").write_text(lines)


def run(folder: Path) -> None:
    """What a run leaves for its report: one merge, scored with base and expert on one task."""
    root = folder / "run"
    merged = root / "merge/average"
    experts = {"red": root / "fetch/experts/red"}
    shutil.copytree(folder / "base", root / "fetch/base")
    shutil.copytree(folder / "adapter", experts["red"])
    merge_checkpoints(root / "fetch/base", experts, merged, "gaussian_poe", device="cpu")
    described = describe_task_vectors(root / "fetch/base", experts)
    _stage(root / "task_vectors", "task_vectors", {"task_vectors.json": described}, {})
    scored: dict[str, Path] = {}
    rows = []
    for kind, label, place, weights in (
        ("base", "base", "evaluate/base", root / "fetch/base"),
        ("expert", "red", "evaluate/experts/red", experts["red"]),
        ("merge", "average", "evaluate/merges/average", merged),
    ):
        outcomes = [0, 1, 1, 0, 1, 1] if kind == "base" else [1, 1, 1, 0, 1, 1]
        score = sum(outcomes) / len(outcomes)
        cell = {"metric": "acc", "score": score, "stderr": 0.1, "items": len(outcomes)}
        items = {"red": {"test": {"ids": list("abcdef"), "outcomes": outcomes}}}
        files = {"items.json": items, "results.json": {"scores": {"red": {"test": cell}}}}
        scored[f"{kind} {label}"] = _stage(root / place, "evaluate", files, {"candidate": weights})
        means = {"mean": {"test": score, "validation": score}, "normalised": {"test": score}}
        rows.append({"label": label, "kind": kind, "scores": {"red": {"test": cell}}, **means})
    board = {"tasks": ["red"], "choose": "mean", "rows": rows, "best": "average"}
    entry = {"name": "tiny", "candidate": "average", "digest": "a" * 64}
    files = {"leaderboard.json": board, "registration.json": entry}
    _stage(root / "register", "register", files, scored)


def _stage(out: Path, stage: str, files: dict[str, Any], inputs: dict[str, Path]) -> Path:
    out.mkdir(parents=True)
    for name, value in files.items():
        write_json(out / name, value)
    sources = tuple(Source(name, hash_files(path)) for name, path in inputs.items())
    Lineage(stage, {}, sources).write(out)
    return out
