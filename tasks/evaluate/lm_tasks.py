"""One lm-eval task with its data, and what a model scores on a split of it."""

import random
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from poemerge.errors import SettingError, SourceError
from tasks.evaluate.scorer import Scorer
from tasks.evaluate.task_files import TaskFiles, broken_line, local_data

BUILT_IN = Path(lm_eval.tasks.__file__).parent
NAMED = rb"""^\s*["']?task["']?\s*:\s*["']?%b["']?\s*(?:#.*)?$"""  # a line of a task's YAML file


@dataclass(frozen=True)
class Score:
    """What a candidate reached on one split of one task.

    Attributes:
        metric: the first of the task's metrics.
        score: as the task aggregates it.
        ids: a hash of every item, in order: equal ones let two candidates be compared in pairs.
        outcomes: the metric of every item.
    """

    metric: str
    score: float
    ids: tuple[str, ...]
    outcomes: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """For results.json; the standard error is that of a mean of the outcomes."""
        items = len(self.outcomes)
        error = statistics.stdev(self.outcomes) / items**0.5 if items > 1 else 0.0
        numbers = {"score": round(self.score, 6), "stderr": round(error, 6)}
        return {"metric": self.metric} | numbers | {"items": items}

    def items(self) -> dict[str, Any]:
        """For items.json."""
        outcomes = [int(x) if x == int(x) else round(x, 6) for x in self.outcomes]
        return {"ids": list(self.ids), "outcomes": outcomes}


@dataclass(frozen=True)
class LoadedTask:
    """An lm-eval task with its data.

    Attributes:
        path: its YAML file.
        test: the split of its data that lm-eval scores by itself.
    """

    task: Any
    name: str
    path: Path
    test: str

    def split(self, split: str, validation: str) -> str:
        """The split of the data that is meant by `validation` or `test`.

        Raises:
            SettingError: there is no such split, or merges would be chosen on the test split.
        """
        if split not in {"validation", "test"}:
            raise SettingError(f"split is {split!r}; choose validation or test.")
        chosen = validation if split == "validation" else self.test
        if split == "validation" and chosen == self.test:
            raise SettingError(
                f"Task {self.name} is tested on its split {chosen!r}, where nothing may be chosen; "
                "set evaluate.validation to another split of its data."
            )
        if chosen not in self.task.dataset:
            raise SettingError(
                f"Task {self.name} has no split {chosen!r} ({', '.join(self.task.dataset)}); set "
                "evaluate.validation to one of these."
            )
        return chosen

    def items(self, split: str, limit: int | None) -> int:
        """How many items of a split of the data are run."""
        size = len(self.task.dataset[split])
        return size if limit is None else min(limit, size)

    def score(self, scorer: Scorer, split: str, limit: int | None, seed: int) -> Score:
        """Run the first `limit` items of a split of the data.

        Raises:
            SettingError: the task's first metric is no score per item of which more is better.
        """
        metric = next(iter(self.task.aggregation()))
        self.task.set_config("test_split", split)
        self.task.set_fewshot_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the generator that tasks draw from
        torch.manual_seed(seed)
        tasks = {"tasks": {self.name: self.task}}
        try:
            found = evaluator.evaluate(scorer, tasks, limit=limit, bootstrap_iters=0)
        except RuntimeError:  # torch: out of memory, say
            raise
        except Exception as error:  # lm-eval met an item that the task's YAML does not expect
            raise SettingError(
                f"Task {self.name} cannot be scored ({_reason(error)}); correct {self.path}."
            ) from error
        samples = found["samples"][self.name]
        first = samples[0]["filter"]
        kept = [sample for sample in samples if sample["filter"] == first]
        if not self.task.higher_is_better()[metric] or isinstance(kept[0][metric], tuple | list):
            raise SettingError(
                f"Task {self.name} has {metric} as its first metric, which is no score per item of "
                "which more is better; put one like acc or exact_match first in `metric_list`."
            )
        return Score(
            metric,
            float(found["results"][self.name][f"{metric},{first}"]),
            tuple(sample["doc_hash"] for sample in kept),
            tuple(float(sample[metric]) for sample in kept),
        )


@lru_cache(maxsize=64)
def load_task(files: TaskFiles) -> LoadedTask:
    """A task with its data in memory; nothing is left in the cache of `datasets`.

    This imports the modules that `!function` names: `find_tasks` saw that they are trusted.

    Raises:
        SettingError: there is no such task, or its files are broken or ask for code of a hub.
        SourceError: the data of a built-in task cannot be loaded.
    """
    path = files.yaml or _builtin(files)
    try:
        config = load_yaml(path)
        _check_metrics(config, path)
        with TemporaryDirectory() as scratch:
            data = local_data(config, path)
            fixed = {"data_files": data, "cache_dir": scratch, "keep_in_memory": True}
            kwargs = (config.get("dataset_kwargs") or {}) | (fixed if data else {})
            loaded = TaskManager(include_defaults=False).load([config | {"dataset_kwargs": kwargs}])
    except SettingError:
        raise
    except Exception as error:  # lm-eval and datasets raise whatever their parts raise
        raise _refusal(files, path, error) from error
    task = loaded["tasks"][files.name]
    test = task.config.test_split or task.config.validation_split
    return LoadedTask(task, files.name, path, test)


def _check_metrics(config: Mapping[str, Any], path: Path) -> None:
    """What lm-eval has no metric for it would fetch from a hub, as code, and run."""
    for asked in () if config.get("process_results") else config.get("metric_list") or ():
        name = asked["metric"]
        if isinstance(name, str) and (name not in METRIC_REGISTRY or asked.get("hf_evaluate")):
            raise SettingError(
                f"{path} asks for the metric {name}, which is code on a hub and never run here; "
                "take one of lm-eval's own, or a `!function` beside that file."
            )


def _builtin(files: TaskFiles) -> Path:
    found = built_in(files.name)
    if found is None:
        near = ", ".join(files.near) or "none"
        raise SettingError(
            f"{files.name!r} is neither a local task (nearest: {near}) nor a single task that is "
            "built into lm-eval; correct evaluate.tasks."
        )
    return found


@lru_cache(maxsize=64)
def built_in(name: str) -> Path | None:
    """The file of a single task of lm-eval's own; to parse all its 14,000 files takes 8 s."""
    line = re.compile(NAMED % re.escape(name.encode()), re.MULTILINE)
    for path in sorted(BUILT_IN.rglob("*.yaml")):
        if line.search(path.read_bytes()):
            entry = TaskIndex.entry_from_path(path)
            if entry and entry.name == name and entry.kind in {Kind.TASK, Kind.PY_TASK}:
                return path
    return None


def _refusal(files: TaskFiles, path: Path, error: Exception) -> Exception:
    if files.yaml is not None and (line := broken_line(file.path for file in files.files)):
        return SettingError(line)
    if files.yaml is None:
        return SourceError(
            f"Task {files.name} is built into lm-eval, and its data cannot be loaded "
            f"({_reason(error)}); connect to the hub, or take a local task."
        )
    return SettingError(
        f"Task {files.name} cannot be loaded from {path} ({_reason(error)}); correct it."
    )


def _reason(error: BaseException) -> str:
    """The first line of what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
