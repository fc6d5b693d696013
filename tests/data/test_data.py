"""The committed task sets and experts are what their page says: sound, disjoint and licensed."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from poemerge.hashing import hash_files, sha256
from poemerge.lineage import Lineage

DATA = Path(__file__).parents[2] / "data"
TASKS = sorted(path.stem for path in (DATA / "tasks").glob("*.yaml"))
EXPERTS = sorted(path.parent.name for path in (DATA / "experts").glob("*/adapter_config.json"))
SPLITS = {"train": 1000, "validation": 200, "test": 400}  # items at least


def rows(task: str, split: str) -> list[dict[str, str]]:
    lines = (DATA / "tasks" / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def key(row: dict[str, str]) -> str:
    """Letters, digits and signs alone: what case, spaces and punctuation cannot tell apart."""
    return re.sub(r"[^a-z0-9+\-*]", "", row["text"].lower())


def factors(expert: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / "experts" / expert / "adapter_model.safetensors")


def config(task: str) -> dict[str, object]:
    return yaml.safe_load((DATA / "tasks" / f"{task}.yaml").read_text())


def test_enough_tasks_each_with_an_expert() -> None:
    assert len(TASKS) == 8
    assert EXPERTS == TASKS


def test_no_item_occurs_twice_in_any_split_of_any_task() -> None:
    keys = Counter(key(row) for task in TASKS for split in SPLITS for row in rows(task, split))
    assert [text for text, count in keys.items() if count > 1] == []


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_large_enough(task: str) -> None:
    for split, least in SPLITS.items():
        assert len(rows(task, split)) >= least


@pytest.mark.parametrize("task", TASKS)
def test_items_are_short_and_hold_no_address(task: str) -> None:
    for row in (row for split in SPLITS for row in rows(task, split)):
        assert row.keys() == {"text", "answer"}
        assert row["text"].strip()
        assert row["answer"]
        assert len(row["text"].split()) <= 60
        assert not re.search(r"@|https?:|\d{7}", row["text"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_choices_in_equal_number(task: str, split: str) -> None:
    counts = Counter(row["answer"] for row in rows(task, split))
    assert sorted(counts) == sorted(config(task)["doc_to_choice"])
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_task_reads_its_own_files(task: str) -> None:
    settings = config(task)
    assert settings["task"] == task
    assert settings["dataset_kwargs"]["data_files"] == {
        split: f"data/tasks/{task}/{split}.jsonl" for split in ("validation", "test")
    }


@pytest.mark.parametrize("expert", EXPERTS)
def test_expert_is_a_plain_small_adapter(expert: str) -> None:
    folder = DATA / "experts" / expert
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lineage.json",
    }
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["task_type"] == "CAUSAL_LM"
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert settings["bias"] == "none"
    assert not settings["use_dora"]
    assert settings["r"] <= 16


@pytest.mark.parametrize("expert", EXPERTS)
def test_expert_is_finite_and_learnt_something_everywhere(expert: str) -> None:
    for name, value in factors(expert).items():
        assert value.dtype == torch.float16, name
        assert value.isfinite().all(), name
        assert value.any(), name


@pytest.mark.parametrize("expert", EXPERTS)
def test_expert_was_trained_on_the_prompt_and_items_that_are_here(expert: str) -> None:
    record = Lineage.find(DATA / "experts" / expert)
    assert record is not None
    read = {name: digest for source in record.inputs for name, digest in source.files.items()}
    assert read["train.jsonl"] == sha256(DATA / "tasks" / expert / "train.jsonl")
    assert read[f"{expert}.yaml"] == sha256(DATA / "tasks" / f"{expert}.yaml")
    assert dict(record.outputs) == hash_files(DATA / "experts" / expert)


def test_experts_began_at_random_factors_of_their_own() -> None:
    for first, second in combinations(map(input_side, EXPERTS), 2):
        assert abs(torch.cosine_similarity(first, second, dim=0)) < 0.2


def input_side(expert: str) -> torch.Tensor:
    """All A factors in one vector."""
    sides = [value for name, value in sorted(factors(expert).items()) if "lora_A" in name]
    return torch.cat([side.float().flatten() for side in sides])


def test_experts_together_are_small() -> None:
    files = (DATA / "experts").glob("*/adapter_model.safetensors")
    assert sum(path.stat().st_size for path in files) <= 24_000_000


@pytest.mark.parametrize("task", TASKS)
def test_source_and_licence_are_stated(task: str) -> None:
    line = next(
        line
        for line in (DATA / "README.md").read_text().splitlines()
        if line.startswith(f"| `{task}`")
    )
    assert re.search(r"MIT|Apache-2\.0|CC0|PDDL", line)
