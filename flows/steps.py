"""The steps of each stage: which task, with which arguments, into which folder."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect.tasks import Task

from flows.meter import measure
from flows.overrides import in_bytes
from flows.places import Places
from flows.sections import Params
from tasks.evaluate import evaluate
from tasks.evaluate.spread import spread
from tasks.fetch import fetch
from tasks.merge import merge
from tasks.register import register
from tasks.report import report
from tasks.task_vectors import task_vectors


@dataclass(frozen=True)
class Step:
    """One call of a task.

    Attributes:
        stage: the stage it belongs to.
        label: which of the stage's steps; the stage's own name where it has one.
        log: where its cost is kept.
    """

    stage: str
    label: str
    task: Task[Any, bool]
    arguments: Mapping[str, Any]
    log: Path

    @property
    def name(self) -> str:
        """For people and for Prefect."""
        return self.stage if self.label == self.stage else f"{self.stage} {self.label}"

    def run(self, call: Callable[..., bool] | None = None) -> bool:
        """Do it, and keep what it cost; True if there was something to do.

        Args:
            call: how to call the task: by default as a plain function, without Prefect.
        """
        with measure() as cost:
            made = (call or self.task.fn)(**self.arguments)
        if made:
            cost.write(self.log)
        return made


def steps(stage: str, places: Places, overrides: tuple[str, ...] = ()) -> Iterator[Step]:
    """The steps of `stage` in order.

    Before evaluating, candidates that are no longer named are cleared away: they would count in
    what DVC hashes.
    """
    if stage == "evaluate":
        for folder in places.stale():
            shutil.rmtree(folder)
    for label, task, arguments in _BUILD[stage](places.params, places, overrides):
        yield Step(stage, label, task, arguments, places.log(stage, label))


def run_all(todo: Sequence[Step], run: Callable[[Step], bool] = Step.run) -> list[bool]:
    """Run steps of one stage in order, candidates on all devices of `evaluate.device` at once.

    Args:
        todo: the steps.
        run: how to run one.

    Returns:
        For each step, whether there was something to do.
    """
    calls = [partial(run, step) for step in todo]
    if todo and todo[0].stage == "evaluate":
        return spread(calls, todo[0].arguments["device"])
    return [call() for call in calls]


Call = tuple[str, Task[Any, bool], dict[str, Any]]


def _fetch(params: Params, places: Places, _: tuple[str, ...]) -> Iterator[Call]:
    sources = {"base": (params.fetch.base, places.base)}
    sources |= {n: (s, places.experts[n]) for n, s in params.fetch.experts.items()}
    for name, (source, out) in sources.items():
        arguments = {
            "name": name,
            "source": source.source,
            "out": str(out),
            "sha256": source.sha256,
            "dtype": params.fetch.dtype,
        }
        yield name, fetch, arguments


def _task_vectors(_: Params, places: Places, __: tuple[str, ...]) -> Iterator[Call]:
    yield "task_vectors", task_vectors, {**_inputs(places), "out": str(places.task_vectors)}


def _merge(params: Params, places: Places, _: tuple[str, ...]) -> Iterator[Call]:
    for label in params.merge.methods:
        arguments = merge_arguments(places, *params.merge.candidate(label))
        yield label, merge, {**arguments, "out": str(places.merge(label))}


def merge_arguments(places: Places, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the merge task is given for a candidate, but for where to put it."""
    merging, runtime = places.params.merge, places.params.runtime
    return {
        **_inputs(places),
        "method": method,
        "settings": dict(settings),
        "device": merging.device,
        "dtype": merging.dtype,
        "seed": merging.seed,
        "memory": in_bytes(merging.memory),
        "vocabulary": merging.vocabulary,
        "foreign": merging.foreign,
        "runtime": runtime.model_dump() if runtime else {},
    }


def _evaluate(params: Params, places: Places, _: tuple[str, ...]) -> Iterator[Call]:
    """The base and the experts on test; the merges on validation too.

    Without tasks there is nothing to evaluate, and by the scores of which to register.
    """
    every = list(params.evaluate.tasks)
    if not every:
        return

    def scoring(
        kind: str, candidate: str, weights: Path | None, tasks: list[str], splits: list[str]
    ) -> Call:
        arguments = {
            "candidate": candidate,
            "kind": kind,
            "base": str(places.base),
            "weights": str(weights) if weights else None,
            "out": str(places.evaluation(kind, candidate)),
            "tasks": tasks,
            "splits": splits,
            **params.evaluate.scoring,
        }
        return candidate, evaluate, arguments

    yield scoring("base", "base", None, every, ["test"])
    for name, folder in places.experts.items():
        if name in every:
            seen = every if params.evaluate.experts == "all" else [name]
            yield scoring("expert", name, folder, seen, ["test"])
    for label in params.merge.methods:
        yield scoring("merge", label, places.merge(label), every, ["validation", "test"])


def _register(params: Params, places: Places, overrides: tuple[str, ...]) -> Iterator[Call]:
    if not params.evaluate.tasks:
        return
    labels = list(params.merge.methods)
    arguments = {
        "base": str(places.base),
        **_scored(params, places),
        "logs": {label: str(places.log("merge", label)) for label in labels},
        "out": str(places.register),
        "tasks": list(params.evaluate.tasks),
        **params.register_.model_dump(),
        "params": params.sections,
        "overrides": list(overrides),
    }
    yield "register", register, arguments


def _report(params: Params, places: Places, _: tuple[str, ...]) -> Iterator[Call]:
    if not params.evaluate.tasks:
        return
    arguments = {
        **_inputs(places),
        **_scored(params, places),
        "out": str(places.report),
        "task_vectors": str(places.task_vectors),
        "register": str(places.register),
        "experiment": params.register_.experiment,
        **params.report.model_dump(),
    }
    yield "report", report, arguments


def _scored(params: Params, places: Places) -> dict[str, Any]:
    """The merges, and what everything was scored."""
    labels = list(params.merge.methods)
    own = [name for name in params.fetch.experts if name in params.evaluate.tasks]
    return {
        "merges": {label: str(places.merge(label)) for label in labels},
        "evaluations": {
            "base": {"base": str(places.evaluation("base", "base"))},
            "expert": {name: str(places.evaluation("expert", name)) for name in own},
            "merge": {label: str(places.evaluation("merge", label)) for label in labels},
        },
    }


def _inputs(places: Places) -> dict[str, Any]:
    experts = {name: str(folder) for name, folder in places.experts.items()}
    return {"base": str(places.base), "experts": experts}


_BUILD = {
    "fetch": _fetch,
    "task_vectors": _task_vectors,
    "merge": _merge,
    "evaluate": _evaluate,
    "register": _register,
    "report": _report,
}
STAGES = tuple(_BUILD)
