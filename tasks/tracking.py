"""MLflow as all who record runs need it: where it is, an experiment, a run with an end."""

import fcntl
import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import clear_frames
from typing import Any
from uuid import uuid4

from poemerge.atomic import PARTIAL
from poemerge.errors import SourceError
from poemerge.redaction import redact

TWICE = re.compile("IntegrityError|UniqueViolation")  # as SQLite, MySQL and PostgreSQL call it
PARENT = "mlflow.parentRunId"  # tag
# What its client says of a server that is not there, after all tries.
AWAY = re.compile(
    r"too many \d+ error responses|connection refused|connection reset|closed connection"
    r"|timed? ?out|name or service not known|max retries exceeded",
    re.IGNORECASE,
)
VARIABLE = "MLFLOW_TRACKING_URI"
PATIENCE = 10  # seconds for the first answer of a server, at each of its tries
ATTEMPT = "poemerge.attempt"  # tag of a run: which call has made it
DATABASE = "mlflow.db"  # in the working directory, where a bare `mlflow ui` looks too
# Without it MLflow's pages open on traces of language model applications.
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default waits for minutes for a dead server
}


def calm_down() -> None:
    """Set what MLflow reads when it is first imported; what the user has set stays."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get(VARIABLE) or f"sqlite:///{Path(DATABASE).resolve()}"


def shown_uri() -> str:
    """The same without the name and password that it may hold."""
    return redact(tracking_uri())


def has_registry() -> bool:
    """False if the first to ask MLflow would make its database."""
    return bool(os.environ.get(VARIABLE)) or Path(DATABASE).exists()


@contextmanager
def connected() -> Iterator[Any]:
    """A client of MLFLOW_TRACKING_URI (default: mlflow.db here), its database initialised.

    Raises:
        SourceError: MLflow refused something or cannot be reached.
    """
    calm_down()
    from mlflow import MlflowClient  # noqa: PLC0415 - 1 s, and only once it is calm
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from requests import RequestException  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    uri = tracking_uri()
    try:
        with _alone(uri):
            _knock(uri)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        yield client
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        raise SourceError(_sentence(uri, error)) from error


def _knock(uri: str) -> None:
    """Ask a server for a sign of life, with less patience than a large upload may need."""
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415 - as above
    from mlflow.utils.rest_utils import http_request  # noqa: PLC0415 - as above

    http_request(get_default_host_creds(uri), "/health", "GET", timeout=PATIENCE)


def _sentence(uri: str, error: Any) -> str:
    """What MLflow refused and what to do."""
    status = error.get_http_status_code() if hasattr(error, "get_http_status_code") else None
    if status == HTTPStatus.UNAUTHORIZED or "error code 401" in str(error):
        cure = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"MLflow at {uri} does not know who asks; {cure}."
    if status == HTTPStatus.FORBIDDEN or "error code 403" in str(error):
        user = os.environ.get("MLFLOW_TRACKING_USERNAME", "you")
        return f"MLflow at {uri} does not allow that to {user}; ask its administrator."
    if away := AWAY.findall(str(error)):  # the last is the cause of those before it
        how = f"MLflow at {uri} does not answer ({away[-1].lower()}); start it or set {VARIABLE}, "
        return how + "and run the same command again: what is done by now is kept."
    reason = " ".join(str(error).partition("[SQL:")[0].split())
    return f"MLflow at {uri} refused ({reason}); mend it, or set {VARIABLE}."


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: two that make the tables of a new SQLite file disturb each other."""
    _, is_file, place = uri.partition("sqlite:///")
    database = Path(place.partition("?")[0])
    if not is_file:
        yield
        return
    try:
        lock = Path(f"{database}.lock").open("w")  # noqa: SIM115 - closed below
    except OSError as error:
        message = f"{database}.lock cannot be written ({error}); mend it, or set {VARIABLE}."
        raise SourceError(message) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed even where the holder is killed
        if not database.exists():
            _make(database)
        yield


def _make(database: Path) -> None:
    """Make a SQLite file beside, then rename it: MLflow cannot go on with one that is half made."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH  # noqa: PLC0415 - above
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: PLC0415 - as above

    place, name = database.parent, database.name
    for left in place.glob(f"{name}.*{PARTIAL}"):  # by a process that was killed
        shutil.rmtree(left)
    # Each time of another name, by which MLflow keeps its connections.
    with TemporaryDirectory(prefix=f"{name}.", suffix=PARTIAL, dir=place) as folder:
        partial = Path(folder, name)
        store = SqlAlchemyStore(f"sqlite:///{partial}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        partial.rename(database)


def upsert(write: Callable[..., object], *arguments: str, **named: object) -> None:
    """Set something in MLflow that somebody else may be setting at this very moment.

    MLflow looks first and inserts then, so of two who set the same thing for the first time one is
    refused; the second time he finds what the other has inserted.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - as above

    try:
        write(*arguments, **named)
    except MlflowException as error:
        if not TWICE.search(str(error)):
            raise
        write(*arguments, **named)


def experiment_id(client: Any, name: str) -> str:
    """Id of the experiment of that name, made where there is none."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - as above

    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return str(client.create_experiment(name, tags=EXPERIMENT))
        except MlflowException:  # another process was quicker, unless it is still not there
            known = client.get_experiment_by_name(name)
            if known is None:
                raise
    return str(known.experiment_id)


@contextmanager
def ending(client: Any, run: str) -> Iterator[str]:
    """See that a run ends: finished, failed, or killed where it was interrupted."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - as above

    try:
        yield run
    except BaseException as error:
        stopped = not isinstance(error, Exception)  # Prefect makes a signal of its own of SIGTERM
        if stopped:  # maybe in the midst of a query, whose leavings lock the database
            clear_frames(error.__traceback__)
            gc.collect()
        with suppress(MlflowException):  # which may be away; that is not what has to be told
            client.set_terminated(run, "KILLED" if stopped else "FAILED")
        raise
    client.set_terminated(run)


def bury(client: Any, place: str, which: str) -> None:
    """End the runs that a killed process has left running, with all below them.

    Args:
        client: of MLflow.
        place: id of the experiment.
        which: filter of MLflow. One that is alive all the same sets its own end when it comes.
    """
    for run in client.search_runs([place], f"{which} and attributes.status = 'RUNNING'"):
        bury(client, place, f"tags.`{PARENT}` = '{run.info.run_id}'")
        client.set_terminated(run.info.run_id, "KILLED")


def marked_run(
    client: Any, place: str, name: str, mark: tuple[str, str], tags: Mapping[str, str]
) -> Any:
    """The run that carries a mark, made where there is none: so a second try goes on with it.

    Of several the oldest counts. Two who make one at once may leave two; what a request made too
    much that was sent again, since the answer to the first was lost, is deleted.

    Args:
        client: of MLflow.
        place: id of the experiment.
        name: of a new run.
        mark: key and value of a tag that says which run it is.
        tags: of a new run, beside the mark.
    """
    key, value = mark

    def known() -> list[Any]:
        found = client.search_runs([place], f"tags.`{key}` = '{value}'")
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    own = uuid4().hex
    if not (found := known()):
        client.create_run(place, run_name=name, tags={**tags, key: value, ATTEMPT: own})
        found = known()
    first, *others = found
    attempts = {own, first.data.tags.get(ATTEMPT, own)}  # an earlier one may have had no answer
    for run in others:
        if run.data.tags.get(ATTEMPT) in attempts:
            client.delete_run(run.info.run_id)
    return first


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow takes them: `a.b` → text."""
    texts: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            texts |= flat(value, f"{prefix}{key}.")
        else:
            texts[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return texts
