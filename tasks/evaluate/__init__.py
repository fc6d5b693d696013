"""evaluate: one candidate, scored by lm-eval on tasks and splits, item by item."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from prefect import task

from poemerge.atomic import write_json
from poemerge.errors import SourceError
from poemerge.hashing import sha256
from poemerge.lineage import Lineage, Source, package_versions, produce
from tasks.evaluate.spread import scored_by
from tasks.evaluate.task_files import TaskFiles, find_tasks
from tasks.evaluate.work import ScoreJob, Scores

STAGE = "evaluate"
FORMAT = "poemerge/evaluation/1"  # raise it when the files of this stage change their meaning
RESULTS = "results.json"
ITEMS = "items.json"
MODEL_FILES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
REPORTS = frozenset({"lineage.json", "merge_report.json"})
TASK = "task:"  # marks tasks among the inputs, where an expert may have the same name
TOOLS = ("lm_eval", "transformers", "tokenizers", "datasets")


@task
def evaluate(
    candidate: str,
    kind: Literal["base", "expert", "merge"],
    base: Path | str,
    weights: Path | str | None,
    out: Path | str,
    *,
    tasks: Sequence[str],
    splits: Sequence[str],
    include: Path | str,
    trust: Sequence[Path | str],
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    seed: int,
    validation: str,
) -> bool:
    """Score one candidate and write results.json and items.json, unless they are up to date.

    Only what changed is scored again: a task whose files are the same keeps its scores as long as
    model, settings and code are the same too. Of a task that is built into lm-eval, data and YAML
    are taken as fixed by lm-eval's version.

    Args:
        candidate: its name in the results.
        kind: `base`; `expert`: seen as an update of the base; `merge`: scored as it is stored.
        base: folder of the base; its config and tokenizer serve all candidates, but for merges
            with added tokens.
        weights: a checkpoint or adapter folder; None for the base itself.
        out: folder to make.
        tasks: names of local tasks, or of tasks that are built into lm-eval (these need the hub).
        splits: of `validation` and `test`; test is the split that lm-eval scores by itself.
        include: folder of lm-eval YAML files.
        trust: folders whose YAML files may run code (`!function`, templates); a task from anywhere
            else is refused.
        limit: items per task and split, from the first; None for all.
        batch_size: items per forward pass.
        dtype: in which the model computes: float32, bfloat16 or float16.
        device: `auto`, `cpu` or `cuda[:i]`; of several, the first, or any of them inside of
            `spread`.
        seed: for few-shot examples and for generation that samples.
        validation: split of the data on which merges are chosen; must not be the test split.

    Returns:
        True if something was scored, False if all of it was there already.

    Raises:
        SettingError: a task, split, dtype or device is unknown, or a task's files are broken or
            not trusted.
        SourceError: the data of a built-in task cannot be loaded, or a folder is missing.
        CheckpointError: the weights do not fill the base's model, or a tokenizer is missing.
    """
    import torch  # noqa: PLC0415 - 1 s

    base, out = Path(base), Path(out)
    weights = None if weights is None else Path(weights)
    how: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "seed": seed}
    how |= {"dtype": dtype, "device": _first(device), "validation": validation}
    found = find_tasks(tasks, Path(include), trust)
    models = {"base": base} if weights is None else {"base": base, "candidate": weights}
    record = _record(models, found, candidate=candidate, kind=kind, splits=list(splits), **how)
    old = _kept(out, record)
    job = ScoreJob(
        candidate=candidate,
        kind=kind,
        weights=weights,
        content=record.inputs[len(models) - 1].digest,
        base=base,
        digest=record.inputs[0].digest,
        tasks=tuple(task for task in found if task.name not in old.results),
        splits=tuple(splits),
        how=how,
        threads=torch.get_num_threads(),
    )
    stamped = _stamped(record, how["device"])
    return produce(out, stamped, lambda folder: _score(folder, job, old, tasks))


def _score(folder: Path, job: ScoreJob, old: Scores, order: Sequence[str]) -> None:
    new = scored_by.get()(job)
    results, items = old.results | new.results, old.items | new.items
    head = {"candidate": job.candidate, "kind": job.kind}
    write_json(folder / RESULTS, head | {"scores": {name: results[name] for name in order}})
    write_json(folder / ITEMS, {name: items[name] for name in order})


def scoring_key(
    base: Path,
    *,
    tasks: Sequence[str],
    splits: Sequence[str],
    include: str,
    trust: Sequence[str],
    **how: Any,
) -> str:
    """What decides the scores of a merge beside its weights: base, tasks, settings, code.

    Args:
        base: folder of the base.
        tasks: as in `evaluate`.
        splits: as in `evaluate`.
        include: as in `evaluate`.
        trust: as in `evaluate`.
        **how: the other settings of `evaluate`.
    """
    found = find_tasks(tasks, Path(include), trust)
    how["device"] = _first(how["device"])
    return _record({"base": base}, found, splits=list(splits), **how).key


def task_digests(
    tasks: Sequence[str], include: Path | str, trust: Sequence[Path | str]
) -> dict[str, str]:
    """Task → digest of all files that decide its items; of built-in ones lm-eval's version does."""
    return {task.name: _task(task).digest for task in find_tasks(tasks, Path(include), trust)}


def _first(device: str) -> str:
    """The device that is recorded: however many there are, one gives the same scores."""
    from poemerge.device import split_devices  # noqa: PLC0415 - torch: 1 s

    return split_devices(device)[0]


def _record(models: Mapping[str, Path], tasks: Sequence[TaskFiles], **params: Any) -> Lineage:
    tools = {tool: metadata.version(tool) for tool in TOOLS[:2]}
    inputs = (*(_model(role, folder) for role, folder in models.items()), *map(_task, tasks))
    return Lineage(STAGE, {"format": FORMAT, **params, **tools}, inputs)


def _stamped(record: Lineage, device: str) -> Lineage:
    """The record with what may differ between machines, and decides nothing."""
    from poemerge.device import describe_device, pick_device  # noqa: PLC0415 - torch: 1 s

    packages = dict(package_versions()) | {tool: metadata.version(tool) for tool in TOOLS}
    return replace(record, device=describe_device(pick_device(device)), packages=packages)


def _model(role: str, folder: Path) -> Source:
    """What is read of a model folder. A card, a report or a record in it changes no score."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder; fetch or merge the {role} first.")
    files = (file for file in sorted(folder.iterdir()) if file.suffix in MODEL_FILES)
    return Source(role, {file.name: sha256(file) for file in files if file.name not in REPORTS})


def _task(task: TaskFiles) -> Source:
    return Source(TASK + task.name, {file.name: file.sha256 for file in task.files})


def _kept(out: Path, record: Lineage) -> Scores:
    """Results and items in `out` that still hold, though others there may not."""
    old = Lineage.find(out)
    if old is None or not old.is_current(out) or _apart(old).key != _apart(record).key:
        return Scores({}, {})
    then, now = ({source.name: source.digest for source in r.inputs} for r in (old, record))
    same = [n.removeprefix(TASK) for n in now if n.startswith(TASK) and then.get(n) == now[n]]
    results = json.loads((out / RESULTS).read_text(encoding="utf-8"))["scores"]
    items: Mapping[str, Any] = json.loads((out / ITEMS).read_text(encoding="utf-8"))
    return Scores({task: results[task] for task in same}, {task: items[task] for task in same})


def _apart(record: Lineage) -> Lineage:
    """The record apart from its tasks."""
    return replace(record, inputs=tuple(s for s in record.inputs if not s.name.startswith(TASK)))
