"""A task on which a tiny model chooses letters, and the evaluate stage at work on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tasks.evaluate import evaluate
from tests.zoo import Zoo

Run = Callable[..., tuple[bool, dict[str, Any], dict[str, Any]]]
LETTERS = "abcd"
SETTINGS = {
    "limit": None,
    "batch_size": 4,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
    "validation": "validation",
}


def documents(split: str, count: int) -> list[dict]:
    """Questions of many lengths, of which each split has others."""
    return [
        {"text": f"{split} {'x' * (7 * i % 11)} {i}", "answer": (i * i) % 4} for i in range(count)
    ]


def write_task(folder: Path, name: str, **config: object) -> Path:
    """A multiple-choice task of 9 validation and 12 test items, with what `config` changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("validation", 9), ("test", 12)):
        lines = "".join(json.dumps(doc) + "\n" for doc in documents(split, count))
        (folder / f"{name}_{split}.jsonl").write_text(lines)
    files = {split: f"{name}_{split}.jsonl" for split in ("validation", "test")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | config, sort_keys=False))
    return folder


def stage(folder: Path, include: Path, zoo: Zoo) -> Run:
    """What runs the stage in a folder; returns whether work was done, results and items."""

    def run(
        weights: Path | None = None, kind: str = "merge", out: str = "out", **changed: Any
    ) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        kind = "base" if weights is None else kind
        arguments = {
            "tasks": ["letters"],
            "splits": ["test"],
            "include": include,
            "trust": [include],
        }
        arguments |= SETTINGS
        base = changed.pop("base", zoo.base())
        done = evaluate.fn(kind, kind, base, weights, folder / out, **arguments | changed)
        read = (json.loads((folder / out / f).read_text()) for f in ("results.json", "items.json"))
        return done, *read

    return run
