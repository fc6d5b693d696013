"""A tiny project under `poemerge deploy --local`, with all that it writes in one folder."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.numpy import load_file, save_file

from flows.overrides import save_values
from poemerge.hashing import sha256
from poemerge.layout import SINGLE
from tests.flows.conftest import make_project
from tests.servers import free_port, running
from tests.zoo import Zoo

LABEL = "poemerge/scheduled"
METHOD = "cauchy_poe"
NAME = "tiny"  # of the registered model
NEVER = "0 0 29 2 *"  # cron: what is due is due because we say so
PATIENCE = 600.0  # seconds that anything may take: the machine may be busy
PAUSE = 0.2  # seconds between two looks
FOLDERS = {"TMPDIR": "tmp", "POEMERGE_QUEUE": "queue", "PREFECT_HOME": "prefect"}
CACHES = {"DVC_SITE_CACHE_DIR": "dvc", "HF_HOME": "hf", "MPLCONFIGDIR": "matplotlib"}
# One candidate on one task: what is quick can be repeated often.
SETTINGS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("merge", "methods"), {METHOD: {"ridge": 1e-2, "epsilon": 0.1}}),
    (("evaluate", "limit"), 2),
    (("report", "detail"), 1),
    (("promote",), {"automatic": True, "min_gain": 0.0, "level": 0.95, "max_drop": 0.05}),
    (("promote", "certificates"), True),
    (("promote", "verify"), True),
    (("schedule",), {"cron": NEVER, "timezone": "UTC", "timeout": 3600}),
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class System:
    """Server, worker and deployment of one project.

    Attributes:
        root: all folders lie in it.
        deploying: `poemerge deploy --local`; server and worker are its children.
        client: of the server.
    """

    root: Path
    deploying: psutil.Process
    client: SyncPrefectClient

    @property
    def project(self) -> Path:
        """The working directory of the runs."""
        return self.root / "project"

    @property
    def model(self) -> str:
        """sha256 of the merged weights."""
        return sha256(self.project / "artifacts/merge" / METHOD / SINGLE)

    @property
    def _params(self) -> Path:
        return self.project / "params.yaml"

    @property
    def parts(self) -> dict[str, psutil.Process]:
        """Server and worker."""
        children = {child.cmdline()[3]: child for child in self.deploying.children()}
        return {name: children[name] for name in ("server", "worker")}

    def run(self, **parameters: Any) -> FlowRun:
        """Have the deployment run now, and wait until the run and its process have ended."""
        due = run_deployment(LABEL, parameters=parameters, timeout=0)
        worker = self.parts["worker"]

        def ended() -> FlowRun | None:
            now = self.client.read_flow_run(due.id)
            is_final = now.state is not None and now.state.is_final()
            return now if is_final and not worker.children() else None

        return until(ended, f"end of run {due.name}")

    def score(self, *, wanted: bool) -> None:
        """Let the next run evaluate, register and report what it merges, or merge alone."""
        save_values(self._params, [(("evaluate", "tasks"), ["red"] if wanted else [])])

    def move_setting(self, step: int) -> None:
        """Let the next run merge with another setting, never used before."""
        key = ("merge", "methods", METHOD, "ridge")
        save_values(self._params, [(key, round(0.01 + 1e-5 * step, 5))])

    def move_source(self, step: int) -> None:
        """Let the next run merge another expert, as if it had been trained on."""
        path = self.project / "data/experts/red/adapter_model.safetensors"
        tensors = load_file(path)
        name = min(tensors)
        tensors[name] = tensors[name] + np.float32(1e-4 * (1 + step))
        save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def system(root: Path) -> Iterator[System]:
    """Make the project in an empty folder, deploy it, and stop all of it afterwards."""
    project = make_project(root / "project", Zoo(root / "zoo"))
    save_values(project / "params.yaml", SETTINGS)
    url = f"http://127.0.0.1:{free_port()}/api"
    log = project / "deploy.log"
    command = [sys.executable, "-m", "flows.cli", "deploy", "--local"]
    with (
        running(command, log, _environment(root, url), f"{url}/health") as process,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        until(lambda: "Ctrl-C" in log.read_text("utf-8"), "worker")
        yield System(root, psutil.Process(process.pid), client)


def until(look: Callable[[], Found | None], what: str) -> Found:
    """Look until there is something.

    Raises:
        TimeoutError: there was nothing for a long time.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(PAUSE)
    raise TimeoutError(f"no {what} in {PATIENCE:.0f} s")


def _environment(root: Path, url: str) -> dict[str, str]:
    """Nothing is written elsewhere, and nothing that belongs to somebody is used."""
    foreign = ("MLFLOW_", "PREFECT_", "DVC_", "POEMERGE_")
    own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    places = {name: root / folder for name, folder in (FOLDERS | CACHES).items()}
    for folder in places.values():
        folder.mkdir()
    return {
        **own,
        **{name: os.fspath(folder) for name, folder in places.items()},
        "DO_NOT_TRACK": "true",
        "DVC_NO_ANALYTICS": "true",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PYTHONUNBUFFERED": "1",
    }
