"""Kinds of bad input around YAML: params.yaml and the files of tasks."""

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml
from ruamel.yaml import YAML

from tests.reliability.corpus import trees
from tests.reliability.corpus.bench import Kind
from tests.reliability.corpus.damage import spoil

BOMB = (
    "[&a [x, x, x, x, x, x, x, x, x]"
    + "".join(
        f", &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    + "]"
)
FRAGMENTS = (
    *("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!function os.system"),
    *("!unknown x", "!!binary 'x'", "!!binary aGk=", "!!set {a, b}", "!!timestamp x", "!!float x"),
    *("&a [*a]", "&a {b: *a}", "*nobody", BOMB, "{<<: 1}", "{<<: [1]}", "{? [a, b] : c}"),
    *(
        "2001-01-01",
        "2001-99-99",
        "2001-01-01T25:61:00Z",
        "0o17",
        "0x1f",
        "1_000",
        "12:30:45",
        "1e-3",
    ),
    *(
        "~",
        "yes",
        ".nan",
        "-.inf",
        ".5.",
        "1e999",
        "'",
        '"',
        "[",
        "{",
        "}",
        "- x",
        "a: b: c",
        "%",
        "@x",
    ),
    *(
        "|",
        ">-",
        "\t",
        "# remark",
        "--- x",
        "...",
        "\ufeff",
        "\u2028x",
        '"\\x00"',
        '"\\ud800"',
        "\x07",
    ),
    "[" * 10_000,
    "{a: " * 5_000 + "1" + "}" * 5_000,
    "[" * 300 + "]" * 300,
    "x" * 300_000,
    "9" * 5_000,
    "[" + "0, " * 20_000 + "0]",
)


def spoil_yaml(tree: Any, random: Random) -> bytes:
    """The text of a tree with one node spoiled, or its bytes."""
    if random.random() < 0.25:
        text = yaml.safe_dump(tree, sort_keys=False)
        return spoil(text.encode(), random)
    yaml_own = random.random() < 0.5
    fragment = random.choice(FRAGMENTS) if yaml_own else trees.fragments(random)
    return trees.spoil_node(tree, random, fragment).encode("utf-8", "surrogatepass")


def _params(folder: Path, random: Random) -> None:
    path = folder / "params.yaml"
    path.write_bytes(spoil_yaml(YAML(typ="safe").load(path), random))


def as_written(folder: Path, way: str) -> None:
    """Every value that was taken over is one that the file has, by another reader of YAML."""
    tree = YAML(typ="safe").load(folder / "params.yaml")
    taken = json.loads((folder / "taken.json").read_text())
    _covered(taken, tree)


DEFAULTS = (None, "refuse", ["data/tasks"])  # of keys that may be left out


def _covered(taken: Any, written: Any) -> None:
    """Mappings have the same keys, but for those that are empty by default."""
    if isinstance(taken, dict):
        assert isinstance(written, dict)
        assert set(written) <= set(taken)
        for key, value in taken.items():
            _covered(value, written[key]) if key in written else _is_empty(value)
    elif isinstance(taken, list):
        assert isinstance(written, list)
        for one, other in zip(taken, written, strict=True):
            _covered(one, other)
    else:
        assert taken == written
        assert isinstance(written, bool) == isinstance(taken, bool)


def _is_empty(value: Any) -> None:
    assert value in DEFAULTS


def _task(folder: Path, random: Random) -> None:
    path = random.choice([*folder.glob("tasks/*.yaml"), *folder.glob("tasks/*/*.jsonl")])
    if path.suffix == ".jsonl":
        path.write_bytes(spoil(path.read_bytes(), random))
    else:
        path.write_bytes(spoil_yaml(yaml.safe_load(path.read_text()), random))


def as_defined(folder: Path, way: str) -> None:
    """A task that was not refused is the one in the files, by other readers of them."""
    tree: dict[str, Any] = {}
    for name in ("common.yaml", "red.yaml"):
        tree |= yaml.safe_load((folder / "tasks" / name).read_text())
    if way == "evaluate":
        cell = json.loads((folder / "out/results.json").read_text())["scores"]["red"]["test"]
        assert 0 <= cell["score"] <= 1
        assert cell["items"] <= 2
        return
    taken = json.loads((folder / "taken.json").read_text())
    assert taken["test"] == (tree.get("test_split") or tree.get("validation_split"))
    for split, file in tree["dataset_kwargs"]["data_files"].items():
        lines = (folder / "tasks" / file).read_text(encoding="utf-8-sig").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        assert [_filled(row, rows) for row in rows] == taken["rows"][split]


def _filled(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of a table has all columns."""
    return {key: row.get(key) for each in rows for key in each}


TASKS = Kind(
    "tasks",
    ("load task", "load task", "evaluate"),
    {"tasks": ("tasks",), "base": ("base",)},
    _task,
    as_defined,
)
PARAMS = Kind(
    "params",
    (
        "load params",
        "poemerge run",
        "load params",
        "poemerge sweep",
        "load params",
        "poemerge deploy",
    ),
    {"params.yaml": ("params.yaml", "params-more.yaml")},
    _params,
    as_written,
)
