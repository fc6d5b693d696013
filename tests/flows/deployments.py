"""What tests of deployments share: schedules, patience, and a look at the processes of runs."""

import time
from collections.abc import Callable
from typing import Any

import psutil

PATIENCE = 240.0  # seconds; a busy machine takes its time
SECRET = "a-secret-of-the-tests"
EVERY_NIGHT = '\nschedule: {cron: "0 3 * * *", timezone: UTC, timeout: 600}\n'
LABEL = "poemerge/scheduled"


def until(found: Callable[[], Any], what: str) -> Any:
    """Look until there is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"no {what} in {PATIENCE:.0f} s")


def engines(pid: int) -> list[psutil.Process]:
    """The processes of flow runs below this one."""
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if "prefect.engine" in " ".join(process.cmdline())]
