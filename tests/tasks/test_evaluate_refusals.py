"""Tasks, settings and weights that the evaluate stage refuses, and where it finds a task."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from poemerge.errors import CheckpointError, PoemergeError, SettingError, SourceError
from tasks.evaluate import lm_tasks
from tests.tasks.letters import Run, write_task
from tests.zoo import Zoo, load, save


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"splits": ["dev"]}, SettingError, "choose validation or test"),
        ({"splits": ["validation"], "validation": "test"}, SettingError, "nothing may be chosen"),
        ({"splits": ["validation"], "validation": "dev"}, SettingError, "no split 'dev'"),
        ({"dtype": "int8"}, SettingError, "float32, bfloat16, float16"),
        ({"device": "tpu"}, SettingError, "cuda"),
        ({"include": "nowhere"}, SettingError, "nowhere is not a folder"),
        ({"base": "nowhere"}, SourceError, "nowhere is not a folder"),
    ],
)
def test_wrong_settings_are_refused(
    score: Run, tmp_path: Path, change: dict[str, Any], error: type[PoemergeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        score(**change)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the tasks of lm-eval."""
    lm_tasks.load_task.cache_clear()
    lm_tasks.built_in.cache_clear()
    folder = write_task(tmp_path / "built-in", "classic")
    monkeypatch.setattr(lm_tasks, "BUILT_IN", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("aclue_couplet_prediction", "aclue/aclue_couplet_prediction.yaml"),  # its keys are quoted
        ("mmlu", None),  # a group
        ("red", None),  # a word in many
    ],
)
def test_single_tasks_of_lm_eval_are_found(name: str, file: str | None) -> None:
    lm_tasks.built_in.cache_clear()
    assert lm_tasks.built_in(name) == (file and lm_tasks.BUILT_IN / file)


@pytest.mark.usefixtures("built_in")
def test_unknown_task_names_the_nearest(score: Run) -> None:
    with pytest.raises(SettingError, match=r"'leters' is neither .*nearest: letters"):
        score(tasks=["leters"])


@pytest.mark.usefixtures("built_in")
def test_other_tasks_are_lm_evals_own(score: Run) -> None:
    _, results, _ = score(tasks=["letters", "classic"])
    assert results["scores"]["classic"] == results["scores"]["letters"]


def test_built_in_task_needs_the_hub(score: Run, built_in: Path) -> None:
    write_task(built_in, "classic", dataset_path="nobody/nothing", dataset_kwargs={})
    with pytest.raises(
        SourceError, match=r"Task classic is built into lm-eval.*connect to the hub"
    ):
        score(tasks=["classic"])


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            ("letters.yaml", "task: letters\nbroken: [1, 2\nx: y\n"),
            r"letters\.yaml, line 3, is no YA",
        ),
        (("letters.yaml", "- a list\n"), r"letters\.yaml is no mapping"),
        (("letters.yaml", "task: letters\ninclude: nothing\n"), "nothing is unreadable"),
        (("letters.yaml", "task: letters\ninclude: letters.yaml\n"), "includes itself"),
        (("twin.yaml", "task: letters\n"), "both define letters"),
        (
            ("letters_test.jsonl", '{"text": "a", "answer": 0}\n{"te\n'),
            r"test\.jsonl, line 2, is no",
        ),
        (("letters_test.jsonl", '{"text": "a"}\n'), r"cannot be scored .*letters\.yaml"),
        (("letters_test.jsonl", None), r"letters_test\.jsonl, which is neither beside it"),
    ],
)
def test_broken_task_files_are_named(
    score: Run, include: Path, tmp_path: Path, broken: tuple[str, str | None], words: str
) -> None:
    file, text = broken
    (include / file).unlink(missing_ok=True)
    if text is not None:
        (include / file).write_text(text)
    with pytest.raises(SettingError, match=words):
        score()
    assert not (tmp_path / "out").exists()


def test_a_metric_that_is_no_score_per_item_is_refused(score: Run, include: Path) -> None:
    metric = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
    write_task(include, "letters", metric_list=[metric])
    with pytest.raises(SettingError, match="mcc as its first metric"):
        score()


def test_a_base_without_tokenizer_is_refused(score: Run, zoo: Zoo, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    save(load(zoo.base()), bare)
    with pytest.raises(CheckpointError, match="bare has no tokenizer"):
        score(base=bare)


def test_weights_that_do_not_fit_are_refused(score: Run, zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(zoo.full(1) / "model.safetensors")
    for name, change, words in (
        ("lacking", {"model.norm.weight": None}, "has no model.norm.weight; it does not fit"),
        ("other", {"lm_head.weight": torch.zeros(95, 32)}, r"lm_head.weight .*\(95, 32\)"),
    ):
        folder = tmp_path / name
        shutil.copytree(zoo.full(1), folder)
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(PoemergeError, match=words):
            score(folder)
