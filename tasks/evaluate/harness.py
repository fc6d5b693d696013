"""lm-eval as a function: a candidate's weights and a task's split in, a score per item out."""

import logging
import random
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers.utils import logging as transformers_logging

from poemerge.adapter import is_adapter
from poemerge.errors import SettingError, SourceError
from poemerge.merge import expert_weights
from tasks.evaluate.scorer import Scorer, load_scorer, put_weights
from tasks.evaluate.task_files import TaskFiles, broken_line, local_data

logger = logging.getLogger(__name__)
for _module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
    # `evaluate` has no switch for these bars, of which there would be hundreds.
    _module.tqdm = partial(
        lambda bar, *args, **how: bar(*args, **how | {"disable": True}), _module.tqdm
    )
_ONE_AT_A_TIME = threading.Lock()  # candidates share one model object


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
class Harness:
    """lm-eval with everything that is the same for all candidates; see `evaluate`."""

    base: Path
    digest: str  # of the base's files
    dtype: str
    device: str
    batch_size: int
    limit: int | None
    seed: int
    validation: str

    def score(
        self,
        candidate: str,
        kind: str,
        weights: Path | None,
        tasks: Sequence[TaskFiles],
        splits: Sequence[str],
    ) -> dict[str, dict[str, Score]]:
        """Task → split → score of one candidate."""
        with _ONE_AT_A_TIME, _quiet():
            loaded = {task.name: load_task(task) for task in tasks}
            wanted = [(t, s, loaded[t].split(s, self.validation)) for t in loaded for s in splits]
            if not wanted:
                return {}
            scorer = load_scorer(self.base, self.digest, self.dtype, self.device, self.batch_size)
            put_weights(scorer.model, self._weights(kind, weights), str(weights or self.base))
            scores: dict[str, dict[str, Score]] = {name: {} for name in loaded}
            for name, split, dataset_split in wanted:
                found = loaded[name].score(scorer, dataset_split, self.limit, self.seed)
                scores[name][split] = found
                items = len(found.outcomes)
                logger.info(
                    "%s on %s, %s: %.3f, %d items", candidate, name, split, found.score, items
                )
        return scores

    def _weights(self, kind: str, weights: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
        if weights is not None and kind == "merge" and not is_adapter(weights):
            return expert_weights(weights, None)  # to the bit what is stored
        return expert_weights(self.base, weights)


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

    This imports the modules that `!function` names: the folder of tasks is trusted.

    Raises:
        SettingError: there is no such task, or its files are broken.
        SourceError: the data of a built-in task cannot be loaded.
    """
    path = files.yaml or _builtin(files)
    try:
        config = load_yaml(path)
        with TemporaryDirectory() as scratch:
            data = local_data(config, path)
            fixed = {"data_files": data, "cache_dir": scratch, "keep_in_memory": True}
            kwargs = (config.get("dataset_kwargs") or {}) | (fixed if data else {})
            loaded = TaskManager(include_defaults=False).load([config | {"dataset_kwargs": kwargs}])
    except Exception as error:  # lm-eval and datasets raise whatever their parts raise
        raise _refusal(files, path, error) from error
    task = loaded["tasks"][files.name]
    test = task.config.test_split or task.config.validation_split
    return LoadedTask(task, files.name, path, test)


def _builtin(files: TaskFiles) -> Path:
    entry = lm_eval_tasks().task_index.get(files.name)
    if entry is None or entry.yaml_path is None or entry.kind.name not in {"TASK", "PY_TASK"}:
        near = ", ".join(files.near) or "none"
        raise SettingError(
            f"{files.name!r} is neither a local task (nearest: {near}) nor a single task that is "
            "built into lm-eval; correct evaluate.tasks."
        )
    return Path(entry.yaml_path)


@lru_cache(maxsize=1)
def lm_eval_tasks() -> TaskManager:
    """14,000 YAML files: 8 s."""
    return TaskManager()


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and remarks of lm-eval, datasets and transformers off the screen."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        datasets.enable_progress_bars()
        transformers_logging.enable_progress_bar()
