"""What all tests share: tiny real models, made here, and tools that leave this machine alone."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

if TYPE_CHECKING:
    from tests.storage import Storage
    from tests.zoo import Zoo

# Set here, since the tools read these when a test file first imports them.
_HOME = Path(tempfile.mkdtemp(prefix="poemerge-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_FOREIGN = (
    "DVC_ROOT",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_URI",
    "POEMERGE_DVC_ROOT",
    "PREFECT_API_KEY",
    "PREFECT_API_URL",
    "PREFECT_PROFILE",
)
for _key in _FOREIGN:
    os.environ.pop(_key, None)
os.environ |= {
    "DO_NOT_TRACK": "true",
    "DVC_GLOBAL_CONFIG_DIR": str(_HOME / "dvc"),
    "DVC_NO_ANALYTICS": "true",
    "DVC_SITE_CACHE_DIR": str(_HOME / "dvc-site"),
    "DVC_SYSTEM_CONFIG_DIR": str(_HOME / "dvc-system"),
    "GIT_AUTHOR_EMAIL": "tests@localhost",
    "GIT_AUTHOR_NAME": "tests",
    "GIT_COMMITTER_EMAIL": "tests@localhost",
    "GIT_COMMITTER_NAME": "tests",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(_HOME / "hf"),
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",  # tiny tensors: threads would only wait for one another
    "MPLCONFIGDIR": str(_HOME / "matplotlib"),
    "POEMERGE_QUEUE": str(_HOME / "queue"),
    "PREFECT_HOME": str(_HOME / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_OFFLINE": "1",
}

set_hypothesis_home_dir(_HOME / "hypothesis")
hypothesis.settings.register_profile(
    "poemerge", max_examples=25, derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("poemerge")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "try tests/reliability as often as docs/reliability.md says, and write that page"
    parser.addoption("--full", action="store_true", help=text)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> "Zoo":
    """The maker of tiny models."""
    from tests.zoo import Zoo  # imports transformers, which not every test needs

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised MLflow database; making one takes seconds, copying it does not."""
    from mlflow import MlflowClient  # imported here, as transformers above

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[str, Any]]:
    """An S3-compatible server."""
    from tests.storage import s3_server  # imported here, as transformers above

    with s3_server() as server:
        yield server


@pytest.fixture
def storage(s3: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> "Storage":
    """A bucket of its own."""
    from tests.storage import new_bucket  # imported here, as transformers above

    return new_bucket(*s3, monkeypatch)


@pytest.fixture(autouse=True)
def _own_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, store or repository of the person who runs the tests is ever touched."""
    for key in _FOREIGN:
        monkeypatch.delenv(key, raising=False)


@contextmanager
def _left_as_found() -> Iterator[None]:
    environment = dict(os.environ)
    loggers = [logging.getLogger(name) for name in ("poemerge", "tasks", "flows")]
    before = [(log.level, log.handlers, log.propagate) for log in loggers]
    told = logging.raiseExceptions
    yield
    logging.raiseExceptions = told
    os.environ.clear()
    os.environ.update(environment)
    for log, (level, handlers, propagate) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.handlers, log.propagate = handlers, propagate


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """A command sets loggers and environment of its process, which here is that of all tests."""
    with _left_as_found():
        yield


@pytest.fixture(scope="module", autouse=True)
def _leave_no_trace_of_a_file() -> Iterator[None]:
    """The same for what all tests of a file share, and make before the first of them."""
    with _left_as_found():
        yield
