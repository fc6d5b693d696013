"""Code that comes with tasks and models: from folders that params.yaml trusts, or not at all."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from poemerge.errors import CheckpointError, SettingError
from poemerge.merging.plan import plan_merge
from tasks.evaluate import evaluate, task_digests
from tasks.evaluate.lm_tasks import load_task
from tasks.evaluate.task_files import find_tasks
from tests.reliability.trials import Trials
from tests.zoo import Zoo

HOW = {
    "limit": 2,
    "batch_size": 2,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
    "validation": "validation",
}
TASK = """\
task: evil
dataset_path: json
dataset_kwargs: {data_files: {validation: items.jsonl, test: items.jsonl}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: [a, b]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SYSTEM = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
MODULE = "import pathlib\npathlib.Path('CANARY').touch()\ndef run(*_, **__):\n    return 'a'\n"


def task(folder: Path, **changed: str) -> Path:
    """A task of two items in a folder, with other values of some keys."""
    folder.mkdir(parents=True, exist_ok=True)
    items = "".join(json.dumps({"text": t, "answer": "a"}) + "\n" for t in "xy")
    (folder / "items.jsonl").write_text(items)
    lines = [line for line in TASK.splitlines() if line.partition(":")[0] not in changed]
    lines += [f"{key}: {value}" for key, value in changed.items() if value]
    (folder / "evil.yaml").write_text("\n".join(lines) + "\n")
    return folder


def module(folder: Path, canary: Path, name: str = "evil_module") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(MODULE.replace("CANARY", str(canary)))


def template(key: str) -> Callable[[Path, Path, Path], None]:
    def make(mine: Path, theirs: Path, canary: Path) -> None:
        said = SYSTEM.replace("CANARY", str(canary))
        task(theirs, **{key: json.dumps(said)})
        (mine / "theirs").symlink_to(theirs)

    return make


def function(key: str) -> Callable[[Path, Path, Path], None]:
    def make(mine: Path, theirs: Path, canary: Path) -> None:
        module(theirs, canary)
        task(theirs, **{key: "!function evil_module.run"})
        (mine / "evil.yaml").symlink_to(theirs / "evil.yaml")

    return make


def by_absolute_path(mine: Path, theirs: Path, canary: Path) -> None:
    module(theirs, canary)
    task(mine, doc_to_text=f"!function {theirs}/evil_module.run")


def by_a_linked_module(mine: Path, theirs: Path, canary: Path) -> None:
    module(theirs, canary)
    task(mine, doc_to_text="!function evil_module.run")
    (mine / "evil_module.py").symlink_to(theirs / "evil_module.py")


def by_including(name: str) -> Callable[[Path, Path, Path], None]:
    def make(mine: Path, theirs: Path, canary: Path) -> None:
        theirs.mkdir()
        said = json.dumps(SYSTEM.replace("CANARY", str(canary)))
        (theirs / "part.yaml").write_text(f"doc_to_text: {said}\n")
        task(mine, doc_to_text="", include=name.replace("THEIRS", str(theirs)))

    return make


WAYS = {
    **{f"template in {k}": template(k) for k in ("doc_to_text", "doc_to_choice", "doc_to_target")},
    **{f"function in {k}": function(k) for k in ("doc_to_text", "process_docs", "process_results")},
    "a module by its absolute path": by_absolute_path,
    "a module by a link": by_a_linked_module,
    "an include upwards": by_including("../theirs/part.yaml"),
    "an include by absolute path": by_including("THEIRS/part.yaml"),
}


def runs(mine: Path, theirs: Path, canary: Path, base: Path, out: Path) -> bool:
    """True if the code is run where both folders are trusted."""
    folder = mine if (mine / "evil.yaml").is_file() else theirs
    args = ("base", "base", base, None, out)
    how = {"tasks": ["evil"], "splits": ["test"], "include": folder, "trust": [mine, theirs]}
    with suppress(SettingError):  # what it returned is no prompt, but then it was too late
        evaluate.fn(*args, **how, **HOW)
    found = canary.exists()
    canary.unlink(missing_ok=True)
    return found


def test_tasks(trials: Trials, tmp_path: Path, zoo: Zoo) -> None:
    """Templates and `!function` from a folder that is not trusted are refused, and not run"""
    for number in trials(short=len(WAYS), full=4 * len(WAYS)):
        with trials.trial(number):
            make = list(WAYS.values())[number % len(WAYS)]
            root = tmp_path / str(number)
            mine, theirs, canary = root / "mine", root / "theirs", root / "canary"
            mine.mkdir(parents=True)
            make(mine, theirs, canary)
            include = mine if (mine / "evil.yaml").is_file() else theirs
            with pytest.raises(SettingError, match=r"in no folder of evaluate\.trust"):
                task_digests(["evil"], include, [mine])
            with pytest.raises(SettingError, match="read that file, then add its folder there"):
                evaluate.fn(
                    *("base", "base", zoo.base(), None, root / "out"), **HOW,
                    tasks=["evil"], splits=["test"], include=include, trust=[mine],
                )  # fmt: skip
            assert not canary.exists()
            assert not (root / "out").exists()
            assert runs(mine, theirs, canary, zoo.base(), root / "out")


def test_hub(trials: Trials, tmp_path: Path) -> None:
    """A metric that only a hub has, or data in a pickle, is refused even where tasks are trusted"""
    asked = [
        {"metric_list": "[{metric: nobody/evil, aggregation: mean, higher_is_better: true}]"},
        {"metric_list": "[{metric: acc, hf_evaluate: true, higher_is_better: true}]"},
        {"dataset_path": "pandas", "dataset_kwargs": "{data_files: {test: items.pkl}}"},
        {"dataset_path": "./loader", "dataset_kwargs": "{trust_remote_code: true}"},
    ]
    for number in trials(short=len(asked), full=len(asked)):
        with trials.trial(number):
            folder, canary = tmp_path / str(number), tmp_path / "canary"
            task(folder, **asked[number])
            (folder / "items.pkl").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
            module(folder, canary, "loader")
            (found,) = find_tasks(["evil"], folder, [folder])
            with pytest.raises(SettingError):
                load_task(found)
            assert not canary.exists()


def test_models(trials: Trials, tmp_path: Path, zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    """Code that a model's config asks for (auto_map) is never run, and is said not to be"""
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for number in trials(short=3, full=9):
        with trials.trial(number), caplog.at_level(logging.INFO):
            root, canary = tmp_path / str(number), tmp_path / "canary"
            base = shutil.copytree(zoo.base(), root / "base")
            module(base, canary, "modeling_evil")
            config = json.loads((base / "config.json").read_text())
            config |= {
                "model_type": "evil",
                "auto_map": dict.fromkeys(classes, "modeling_evil.run"),
            }
            config["architectures"] = classes[: 1 + number % 3]
            (base / "config.json").write_text(json.dumps(config))
            with plan_merge(base, {"a": zoo.full(1)}, "average", {}) as plan:
                assert any("auto_map" in note and "never runs" in note for note in plan.notes)
            tasks = {"tasks": ["evil"], "include": task(root / "tasks"), "trust": [root / "tasks"]}
            with pytest.raises(CheckpointError, match=r"asks for Python code of its own"):
                evaluate.fn("base", "base", base, None, root / "o", splits=["test"], **tasks, **HOW)
            assert not canary.exists()
