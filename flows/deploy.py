"""A Prefect deployment of the pipeline: what prefect.yaml says, on the schedule of params.yaml."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, cast
from zoneinfo import available_timezones

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runner.storage import LocalStorage
from prefect.schedules import Cron
from prefect.server.schemas.schedules import CronSchedule
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.workers.process import ProcessWorker

from flows.params import load, read
from flows.sections import ScheduleParams
from poemerge.errors import SettingError

TEMPLATE = Path("prefect.yaml")


@dataclass(frozen=True)
class Deployment:
    """What is to be deployed from the working directory.

    Attributes:
        name: beside the flow's own, `poemerge/NAME`.
        pool: work pool whose workers run it.
        entrypoint: file and flow, below the working directory.
        arguments: of the flow.
        schedule: cron line and time zone.
        variables: what the pool's workers set for a run, its environment above all.
        words: description and tags.
    """

    name: str
    pool: str
    entrypoint: str
    arguments: Mapping[str, Any]
    schedule: ScheduleParams
    variables: Mapping[str, Any]
    words: Mapping[str, Any]

    @classmethod
    def find(cls, params: Path, *, name: str | None = None, pool: str | None = None) -> Self:
        """The first deployment of prefect.yaml, on the schedule of `params`.

        Args:
            params: parameter file of the runs.
            name: instead of the template's.
            pool: likewise.

        Raises:
            SettingError: a file, the cron line or the time zone is refused.
        """
        schedule = load(params).schedule
        if schedule is None:
            raise SettingError(f"{params} has no section `schedule`; add cron, timezone, timeout.")
        _check(params, schedule)
        template = _template()
        where = template["work_pool"]
        return cls(
            name=name or template["name"],
            pool=pool or where["name"],
            entrypoint=template["entrypoint"],
            arguments={**template.get("parameters", {}), "params": os.fspath(params)},
            schedule=schedule,
            variables=where.get("job_variables", {}),
            words={key: template[key] for key in ("description", "tags") if key in template},
        )

    def apply(self, client: SyncPrefectClient) -> str:
        """Make the deployment, or bring the one of that name up to date; its work pool likewise.

        Returns:
            Its id.

        Raises:
            SettingError: the entrypoint names no flow.
        """
        _make_pool(client, self.pool)
        try:
            made = RunnerDeployment.from_storage(
                LocalStorage(os.fspath(Path.cwd())),
                self.entrypoint,
                self.name,
                schedule=Cron(self.schedule.cron, timezone=self.schedule.timezone),
                parameters=dict(self.arguments),
                work_pool_name=self.pool,
                job_variables=dict(self.variables),
                **self.words,
            )
        except (PrefectException, ImportError, OSError, ValueError) as error:
            message = f"{TEMPLATE}: entrypoint {self.entrypoint} names no flow here ({error})."
            raise SettingError(message) from error
        return str(cast("RunnerDeployment", made).apply())  # a coroutine only inside another

    def next_runs(self, count: int) -> list[datetime]:
        """The moments at which Prefect will start it, in the schedule's own time zone."""
        return _dates(self.schedule, count)


def _template() -> dict[str, Any]:
    """The first deployment of prefect.yaml."""
    match read(TEMPLATE).get("deployments"):
        case [{"name": str(), "entrypoint": str(), "work_pool": {"name": str()}} as found, *_]:
            return dict(found)
    message = f"{TEMPLATE} must begin `deployments` with a name, entrypoint and work_pool.name."
    raise SettingError(message)


def _dates(schedule: ScheduleParams, count: int) -> list[datetime]:
    calendar = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    return [*run_coro_as_sync(calendar.get_dates(count))]


def _check(params: Path, schedule: ScheduleParams) -> None:
    where = f"{params}: schedule"
    if schedule.timezone not in available_timezones():
        raise SettingError(
            f"{where}.timezone is {schedule.timezone!r}, no time zone; write an IANA name, such as "
            "Europe/Berlin or UTC."
        )
    try:
        _dates(schedule, 1)
    except ValueError as error:
        raise SettingError(
            f"{where}.cron is {schedule.cron!r}, which never comes; write minute hour day month "
            'weekday, such as "0 3 * * *".'
        ) from error


def _make_pool(client: SyncPrefectClient, name: str) -> None:
    try:
        kind = client.read_work_pool(name).type
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(name=name, type="process", base_job_template=template)
        )
        return
    if kind != "process":
        message = f"work pool {name} is of type {kind}, not process; name another by --pool."
        raise SettingError(message)
