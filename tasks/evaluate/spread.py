"""Candidates side by side: a process for each device, which takes the next when it is free."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar

from poemerge.errors import SettingError
from tasks.evaluate.work import ScoreJob, Scores, score

# Who does the jobs of `evaluate`: this process, or a worker inside of `spread`.
scored_by: ContextVar[Callable[[ScoreJob], Scores]] = ContextVar("scored_by", default=score)


def spread(calls: Sequence[Callable[[], bool]], device: str) -> list[bool]:
    """Make calls of `evaluate`, as many at once as there are devices; what they return, in order.

    Args:
        calls: each with a folder of its own to make.
        device: one, on which this process scores one after another, or several of one kind,
            `cuda:0,cuda:1` say.

    Raises:
        PoemergeError: the first that a call raised; or the devices are of several kinds.
    """
    from poemerge.device import describe_device, pick_device, split_devices  # noqa: PLC0415  torch

    devices = split_devices(device)
    if len(devices) == 1:
        return [call() for call in calls]
    kinds = sorted({describe_device(pick_device(name)) for name in devices})
    if len(kinds) > 1:
        raise SettingError(
            f"evaluate.device is {device!r}, which are of {len(kinds)} kinds ({'; '.join(kinds)}); "
            "name those of one, or scores would differ by where they were made."
        )
    from tasks.runners.pool import Pool  # noqa: PLC0415 - imports torch

    with Pool(devices, score) as pool:
        token = scored_by.set(pool.do)
        try:
            return pool.run(calls)
        finally:
            scored_by.reset(token)
