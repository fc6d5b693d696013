"""MLflow, as every stage that talks to it does: quiet, initialised, refusing in one sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from poemerge.errors import SourceError

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"  # in the working directory, where a bare `mlflow ui` looks too
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default waits for minutes for a dead server
}


def calm_down() -> None:
    """Set what MLflow reads when it is imported; what the user has set stays."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).resolve()}"


@contextmanager
def connected() -> Iterator["MlflowClient"]:
    """A client of MLFLOW_TRACKING_URI (default: mlflow.db here), its database initialised.

    Raises:
        SourceError: MLflow refused something or cannot be reached.
    """
    calm_down()
    from mlflow import MlflowClient  # noqa: PLC0415 - 1 s, and only after it was calmed
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    uri = tracking_uri()
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        yield client
    except MlflowException as error:
        reason = " ".join(str(error).split())
        message = f"MLflow at {uri} refused ({reason}); mend it, or set MLFLOW_TRACKING_URI."
        raise SourceError(message) from error
