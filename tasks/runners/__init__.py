"""Where the shards of a merge are made: other processes, a Dask cluster, a Ray cluster.

The bytes are the same everywhere (poemerge/merging/work.py), so nothing records where it was.
Why not Prefect's own task runners: docs/decisions/0009-runners.md.
"""

from typing import TYPE_CHECKING, Literal, get_args

from poemerge.errors import SettingError

if TYPE_CHECKING:
    from poemerge.merging.head import Runner

RunnerName = Literal["threads", "processes", "dask", "ray"]
RUNNERS: tuple[RunnerName, ...] = get_args(RunnerName)


def open_runner(
    runner: str = "threads", workers: int | None = None, address: str | None = None, *, device: str
) -> "Runner | None":
    """The runner of that name; None where this process makes all shards itself.

    Args:
        runner: `threads`, `processes`, `dask` or `ray`.
        workers: of those that are started here; None is one for each device.
        address: of a Dask or Ray cluster that runs already; None starts workers here.
        device: that the merge is asked for on, or several, `cuda:0,cuda:1` say.

    Raises:
        SettingError: these do not go together, or Dask or Ray is not installed.
    """
    if runner not in RUNNERS:
        raise SettingError(f"runner is {runner!r}; choose {', '.join(RUNNERS)}.")
    _check(runner, workers, address, device)
    if runner == "processes":
        from tasks.runners.processes import Processes, devices_of  # noqa: PLC0415 - imports torch

        return Processes(devices_of(device, workers))
    if runner == "dask":
        from tasks.runners.on_dask import OnDask  # noqa: PLC0415 - may not be installed

        return OnDask(workers or 1, address)
    if runner == "ray":
        from tasks.runners.on_ray import OnRay  # noqa: PLC0415 - likewise

        return OnRay(workers or 1, address)
    return None


def _check(runner: str, workers: int | None, address: str | None, device: str) -> None:
    if workers is not None and (runner == "threads" or address is not None):
        why = "a cluster has its own" if address is not None else "threads has none"
        raise SettingError(f"workers is {workers}, but {why}; leave it out.")
    if address is not None and runner not in {"dask", "ray"}:
        raise SettingError(f"address is of a Dask or Ray cluster, and runner is {runner}.")
    if "," in device and runner in {"dask", "ray"}:
        raise SettingError(
            f"device is {device!r}; a worker of {runner} takes the GPU that it sees: say cuda."
        )
