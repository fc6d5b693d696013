"""MLflow as all who record runs need it: where it is, an experiment, a run with an end."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poemerge.errors import SourceError

DATABASE = "mlflow.db"  # in the working directory, where a bare `mlflow ui` looks too
# Without it MLflow's pages open on traces of language model applications.
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default waits for minutes for a dead server
}


def calm_down() -> None:
    """Set what MLflow reads when it is first imported; what the user has set stays."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).resolve()}"


@contextmanager
def connected() -> Iterator[Any]:
    """A client of MLFLOW_TRACKING_URI (default: mlflow.db here), its database initialised.

    Raises:
        SourceError: MLflow refused something or cannot be reached.
    """
    calm_down()
    from mlflow import MlflowClient  # noqa: PLC0415 - 1 s, and only once it is calm
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    uri = tracking_uri()
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        yield client
    except (MlflowException, SQLAlchemyError) as error:
        reason = " ".join(str(error).partition("[SQL:")[0].split())
        message = f"MLflow at {uri} refused ({reason}); mend it, or set MLFLOW_TRACKING_URI."
        raise SourceError(message) from error


def experiment_id(client: Any, name: str) -> str:
    """Id of the experiment of that name, made where there is none."""
    known = client.get_experiment_by_name(name)
    return known.experiment_id if known else client.create_experiment(name, tags=EXPERIMENT)


@contextmanager
def ending(client: Any, run: str) -> Iterator[str]:
    """See that a run ends: finished, failed, or killed where it was interrupted."""
    try:
        yield run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        client.set_terminated(run, "KILLED" if stopped else "FAILED")
        raise
    client.set_terminated(run)


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow takes them: `a.b` → text."""
    texts: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            texts |= flat(value, f"{prefix}{key}.")
        else:
            texts[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return texts
