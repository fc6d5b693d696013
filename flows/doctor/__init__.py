"""Is everything there that a merge needs, and if not, what is to be done?

Every check is a function without arguments that yields findings. They run side by side in threads
that nobody waits for longer than `LIMIT`: a server that accepts and never answers costs a line.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from threading import Thread

from flows.doctor.decisions import decisions
from flows.doctor.finding import Finding, problem
from flows.doctor.packages import device, packages
from flows.doctor.project import data, folders, git, remote
from flows.doctor.services import hub, mlflow, prefect
from poemerge.redaction import redact

Check = Callable[[], Iterable[Finding]]
CHECKS: Mapping[str, Check] = {
    "packages": packages,
    "device": device,
    "MLflow": mlflow,
    "decisions": decisions,
    "Prefect": prefect,
    "hub": hub,
    "DVC": data,
    "DVC remote": remote,
    "git": git,
    "folders": folders,
}
LIMIT = 60.0  # seconds for all of them; a busy machine needs half of it to import the libraries


def examine(checks: Mapping[str, Check] = CHECKS, limit: float = LIMIT) -> list[Finding]:
    """What the checks find, in their order.

    Args:
        checks: by name.
        limit: seconds after which a check that has not ended is itself a problem.
    """
    found: dict[str, list[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = list(check())
        except Exception as error:  # noqa: BLE001 - whatever it is, the others' lines matter too
            said = f"could not be looked at: {type(error).__name__}, {redact(str(error))}"
            found[name] = [problem(name, said, "mend what the message names")]

    threads = [Thread(target=run, args=each, daemon=True) for each in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = "see what it waits for, or try again when the machine is less busy"
    return [
        finding
        for name in checks
        for finding in found.get(name, [problem(name, f"no answer in {limit:.0f} s", silent)])
    ]
