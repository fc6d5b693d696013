"""Where a report is found from elsewhere: beside its leaderboard in MLflow."""

import logging
import os
from pathlib import Path
from typing import Any

from poemerge.hashing import digest, hash_files
from poemerge.layout import RECORD
from tasks.report.sources import BOARD, read
from tasks.tracking import connected, shown_uri

LEADERBOARD, REPORT = "poemerge.leaderboard", "poemerge.report"  # tags: digests of the contents
FOLDER = "report"  # of the run's artifacts

logger = logging.getLogger(__name__)


def log(out: Path, register: Path, experiment: str) -> bool:
    """Put the report beside the leaderboard that it shows, once.

    Args:
        out: folder of the report.
        register: folder of the leaderboard.
        experiment: of its run in MLflow.

    Returns:
        True if it was logged, False if MLflow has it, or has no run of that leaderboard.

    Raises:
        SourceError: MLflow refused.
    """
    content = digest(hash_files(out))
    with connected() as client:
        run = _run(client, register, experiment)
        if run is None:
            logger.warning("MLflow has no run of this leaderboard; the report is in %s only", out)
            return False
        if run.data.tags.get(REPORT) == content:
            return False
        for file in sorted(path for path in out.iterdir() if path.name != RECORD):
            client.log_artifact(run.info.run_id, os.fspath(file), FOLDER)
        client.set_tag(run.info.run_id, REPORT, content)
    return True


def address(register: Path, experiment: str) -> str | None:
    """Where a browser finds the files of a report; None without a server, or a run that has it.

    Args:
        register: folder of the leaderboard.
        experiment: of its run in MLflow.

    Raises:
        SourceError: MLflow refused.
    """
    server = shown_uri().rstrip("/")
    if not server.startswith(("http://", "https://")):
        return None
    with connected() as client:
        run = _run(client, register, experiment)
    if run is None:
        return None
    where = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"{server}/#/{where}/artifacts/{FOLDER}"


def _run(client: Any, register: Path, experiment: str) -> Any:
    """The newest run of a leaderboard; None where there is none."""
    place = client.get_experiment_by_name(experiment)
    query = f"tags.`{LEADERBOARD}` = '{digest(read(register / BOARD))}'"
    runs = client.search_runs([place.experiment_id], query, max_results=1) if place else []
    return next(iter(runs), None)
