"""The whole chain as one Prefect flow: order, and nothing else."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import wait
from prefect.tasks import Task

from flows import versioning
from flows.console import OURS
from flows.params import load, read
from flows.places import PLAIN, Places
from flows.steps import STAGES, Step, steps

PER_STEP = ("merge",)  # one DVC stage for each step

logger = logging.getLogger("flows.pipeline")  # Prefect loads this file under a name of its own


@flow(name="poemerge", persist_result=True, result_serializer="json")
def pipeline(params: str = "params.yaml", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fetch, compare, merge, evaluate and register what `params` says.

    Args:
        params: path of the parameter file; what differs from params.yaml, which DVC reads, gets a
            place of its own, and dvc.lock stays as it is.
        overrides: `a.b=c` settings for this run alone; likewise.

    Returns:
        See `Places.outcome`.

    Raises:
        PoemergeError: something was refused.
    """
    for name in OURS:  # in a worker nobody else does, and Prefect's log would lack our lines
        logging.getLogger(name).setLevel(logging.INFO)
    path = Path(params)
    tree = read(path)
    places = Places(load(path, overrides), load(PLAIN))
    if places.is_plain:
        versioning.check()
    made = []
    for stage in STAGES:
        todo = list(steps(stage, places, tuple(overrides)))
        if not todo:
            logger.info("%s: left out, for evaluate.tasks is empty", stage)
            continue
        made += [step.name for step in run_stage(stage, todo)]
        if places.is_plain:
            versioning.commit(_dvc_names(stage, todo), tree)
    return places.outcome(made)


def run_stage(stage: str, todo: list[Step]) -> list[Step]:
    """Run the steps, downloads side by side; those that had something to do are returned."""
    logger.info("%s: %s", stage, ", ".join(step.label for step in todo))
    if stage == "fetch":
        futures = [_named(step).submit(**step.arguments) for step in todo]
        wait(futures)
        made = [future.result() for future in futures]
    else:
        made = [_run_step(step) for step in todo]
    done = [step for step, new in zip(todo, made, strict=True) if new]
    if len(done) < len(todo):
        logger.info("%s: %d of %d were up to date", stage, len(todo) - len(done), len(todo))
    return done


def _run_step(step: Step) -> bool:
    made = step.run(_named(step))
    if made:
        logger.info("%s done", step.name)
    return made


def _named(step: Step) -> Task[Any, bool]:
    return step.task.with_options(task_run_name=step.name)


def _dvc_names(stage: str, todo: list[Step]) -> list[str]:
    return [f"{stage}@{step.label}" for step in todo] if stage in PER_STEP else [stage]
