"""Records, YAML and texts that once crashed, hung or passed; what the corpus finds is kept here."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.overrides import parse_override
from poemerge.documents import LEVELS, check_tree, parse_json
from poemerge.errors import CheckpointError, PoemergeError, SettingError, SourceError
from poemerge.hashing import hash_files
from poemerge.layout import RECORD
from poemerge.lineage import Lineage, Source
from tasks.fetch import trained_on
from tasks.paired import Outcomes
from tasks.provenance.history import Evaluation
from tests.reliability.readers import parameters, tasks
from tests.zoo import Zoo

pytestmark = pytest.mark.usefixtures("in_time")


def test_a_tree_that_holds_itself_or_stands_for_too_much() -> None:
    knot: list[object] = []
    knot.append(knot)
    bomb: list[object] = ["x"] * 9
    for _ in range(9):
        bomb = [bomb] * 9
    for tree in (knot, bomb):
        with pytest.raises(ValueError, match="more than"):
            check_tree(tree)
    assert parse_json("[" * (LEVELS - 1) + "]" * (LEVELS - 1))


def test_a_message_is_one_short_line_whatever_stands_in_it() -> None:
    said = str(CheckpointError(f"a\n\x1b[31m\u202e{'x' * 10_000_000} is bad; mend it."))
    assert said.isprintable()
    assert len(said) < 2_000
    assert said.startswith("a\\n\\x1b[31m\\u202ex")
    assert said.endswith("x is bad; mend it.")


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 5},
        {"params": []},
        {"params": None},
        {"params": {"a": float("inf")}},
        {"outputs": {"a": 1}},
        {"outputs": ["a"]},
        {"inputs": {"a": 1}},
        {"inputs": [{"name": "a", "files": {"../../a": "b"}}]},
        {"inputs": [{"name": "a", "files": {"/a": "b"}}]},
        {"inputs": [{"name": "a", "files": {}, "parent": {"stage": "merge"}}]},
        {"inputs": [{"name": "a", "files": {}, "parent": "x"}]},
        {"packages": None},
    ],
)
def test_a_record_of_other_kinds(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"stage": "merge", "params": {}, "inputs": [], **change}
    (tmp_path / RECORD).write_text(json.dumps(record))
    with pytest.raises(SourceError, match="no lineage record"):
        Lineage.find(tmp_path)


def test_a_fetched_expert_whose_record_names_no_source(tmp_path: Path) -> None:
    Lineage("fetch", {}).write(tmp_path)
    assert trained_on(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "a: [&a [x, x], &b [*a, *a]"
        + "".join(
            f", &{n} [{', '.join([f'*{m}'] * 9)}]"
            for m, n in zip("bcdefgh", "cdefghi", strict=True)
        )
        + "]",
        "a: &a [*a]",
        "a: " + "[" * 5_000,
        "a: !!float x",
        "a: !!timestamp x",
        "a: !!python/object/apply:os.system ['true']",
        "a: 2001-99-99",
        'a: "\\ud800"',
        "a: " + "x" * 300_000,
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_is_a_bomb_or_worse(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingError, match="no readable YAML"):
        parameters(tmp_path)
    (tmp_path / "params.yaml").rename(tmp_path / "red.yaml")
    with pytest.raises(SettingError, match=r"red\.yaml"):
        tasks(tmp_path)


def test_a_value_on_the_command_line_that_is_too_deep() -> None:
    with pytest.raises(SettingError, match="no YAML"):
        parse_override("merge.seed=" + "[" * 5_000)


@pytest.mark.parametrize(
    "line", ["include: 5", "include: [{}]", "dataset_kwargs: x", "dataset_path: []"]
)
def test_a_task_of_other_types(tmp_path: Path, line: str) -> None:
    (tmp_path / "red.yaml").write_text(f"task: red\n{line}\n")
    with pytest.raises(SettingError, match="which lm-eval does not know; correct it"):
        tasks(tmp_path)


@pytest.mark.parametrize(
    "cell",
    [5, {"ids": ["a"]}, {"ids": "a", "outcomes": [True]}, {"ids": [1], "outcomes": [1]},
     {"ids": ["a"], "outcomes": [float("nan")]}, {"ids": ["a", "b"], "outcomes": [1]}],
)  # fmt: skip
def test_items_of_other_kinds(tmp_path: Path, cell: object) -> None:
    (tmp_path / "items.json").write_text(json.dumps({"red": {"test": cell}}))
    with pytest.raises(SourceError, match="run evaluate again"):
        Outcomes.read(tmp_path, ["red"], "test")


@pytest.mark.parametrize("results", [[], {}, {"scores": {"red": 5}}, {"scores": {"a": {"b": {}}}}])
def test_results_of_other_kinds(tmp_path: Path, results: object) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SourceError, match="evaluate again"):
        Evaluation.read(tmp_path)


def test_a_record_that_asks_for_more_than_a_merge(zoo: Zoo, tmp_path: Path) -> None:
    from poemerge.methods import METHODS
    from tasks.provenance.reproduce import Reach, reproduce

    assert "average" in METHODS
    sound = {"method": "average", "settings": {}, "device": "cpu"}
    inputs = (Source("base", hash_files(zoo.base()), str(zoo.base())),)
    for params in (
        {},
        sound | {"overwrite": True},
        sound | {"seed": "x"},
        sound | {"settings": {"device": "cpu"}},
        sound | {"settings": []},
    ):
        Lineage("merge", params, inputs).write(tmp_path)
        with pytest.raises(PoemergeError):
            reproduce(str(tmp_path), tmp_path / "out", Reach(lambda _: None), lambda *_: tmp_path)
