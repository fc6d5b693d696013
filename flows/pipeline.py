"""The whole chain as one Prefect flow: order, and nothing else."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.states import Completed
from prefect.tasks import Task

from flows import artifacts, changes, versioning
from flows.console import OURS
from flows.limits import at_most
from flows.params import read
from flows.places import ARTIFACTS, Places
from flows.promote import after_run
from flows.selection import find_places
from flows.sharing import share
from flows.steps import STAGES, Step, run_all, steps
from flows.turns import turn
from poemerge.alone import alone
from poemerge.redaction import guard_logs
from tasks.dvc_store.remote import check_remote
from tasks.fetch import resolved_once
from tasks.progress import watched_by, watching

PER_STEP = ("merge",)  # one DVC stage for each step
UP_TO_DATE = "UpToDate"  # name of the Prefect state of a run that had nothing to do

logger = logging.getLogger("flows.pipeline")  # Prefect loads this file under a name of its own


@flow(name="poemerge", persist_result=False, result_serializer="json")
def pipeline(
    params: str = "params.yaml",
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    push: bool = False,
) -> dict[str, Any]:
    """Fetch, compare, merge, evaluate and register what `params` says, if anything moved.

    Args:
        params: path of the parameter file; what differs from params.yaml, which DVC reads, gets a
            place of its own, and dvc.lock stays as it is.
        overrides: `a.b=c` settings for this run alone; likewise.
        force: look at every stage, though nothing moved since the last complete run.
        push: bring what was made to the DVC remote, before anything is promoted.

    Returns:
        See `Places.outcome`; `promotion`: see `after_run`. Where there was nothing to do, in a
        state named UpToDate and without a promotion.

    Raises:
        PoemergeError: something was refused, or took longer than it may.
    """
    guard_logs()
    for name in OURS:  # in a worker nobody else does, and Prefect's log would lack our lines
        logging.getLogger(name).setLevel(logging.INFO)
    with resolved_once():
        return _bring_up_to_date(Path(params), tuple(overrides), force=force, push=push)


def _bring_up_to_date(
    path: Path, overrides: tuple[str, ...], *, force: bool, push: bool
) -> dict[str, Any]:
    """Look what moved, and run all stages if anything did.

    For whom calls the flow, Prefect takes the data out of the state.
    """
    tree = read(path)
    places = find_places(path, overrides)
    if places.is_plain:
        versioning.check()
    if push:
        check_remote()
    standing = changes.look(places)
    logger.info("%s", standing)
    if standing.is_current and not force:
        if push:
            share(places)
        nothing = places.outcome([])
        return Completed(name=UP_TO_DATE, message=str(standing), data=nothing)  # type: ignore[return-value]
    artifacts.show_moved(standing)
    limit = places.params.schedule.timeout if places.params.schedule else None
    with (
        at_most(limit),
        alone(ARTIFACTS),  # whatever params it has, a run reads and writes there
        turn(places.params.devices),
        watched_by(*watching(), artifacts.Steps()),
    ):
        made = _run(places, tree, overrides)
        if push:
            share(places)
        promotion = after_run(places, trial=bool(overrides))
        changes.conclude(places)
    outcome = places.outcome(made) | {"promotion": promotion}
    artifacts.show_outcome(outcome, places.params.register_.experiment)
    return Completed(message=artifacts.ending(outcome), data=outcome)  # type: ignore[return-value]


def _run(places: Places, tree: Mapping[str, Any], overrides: tuple[str, ...]) -> list[str]:
    """Stage after stage; names of the steps that had something to do."""
    made = []
    for stage in STAGES:
        todo = list(steps(stage, places, overrides))
        if not todo:
            logger.info("%s: left out, for evaluate.tasks is empty", stage)
            continue
        made += [step.name for step in run_stage(stage, todo)]
        if places.is_plain:
            versioning.commit(_dvc_names(stage, todo), tree)
    return made


def run_stage(stage: str, todo: list[Step]) -> list[Step]:
    """Run the steps, downloads side by side; those that had something to do are returned."""
    logger.info("%s: %s", stage, ", ".join(step.label for step in todo))
    if stage == "fetch":
        futures = [_named(step).submit(**step.arguments) for step in todo]
        wait(futures)
        made = [future.result() for future in futures]
    else:
        made = run_all(todo, _run_step)
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
    """Prefect keeps no result: a stored one says by what it is read, and that may be pickle."""
    return step.task.with_options(
        task_run_name=step.name, persist_result=False, cache_policy=NO_CACHE
    )


def _dvc_names(stage: str, todo: list[Step]) -> list[str]:
    return [f"{stage}@{step.label}" for step in todo] if stage in PER_STEP else [stage]
