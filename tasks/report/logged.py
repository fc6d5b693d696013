"""Where a report is found from elsewhere: beside its leaderboard in MLflow."""

import logging
import os
from pathlib import Path

from poemerge.lineage import RECORD, digest, hash_files
from tasks.report.sources import BOARD, read
from tasks.tracking import connected

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
        place = client.get_experiment_by_name(experiment)
        board = digest(read(register / BOARD))
        query = f"tags.`{LEADERBOARD}` = '{board}'"
        runs = client.search_runs([place.experiment_id], query, max_results=1) if place else []
        if not runs:
            logger.warning("MLflow has no run of this leaderboard; the report is in %s only", out)
            return False
        (run,) = runs  # the newest
        if run.data.tags.get(REPORT) == content:
            return False
        for file in sorted(path for path in out.iterdir() if path.name != RECORD):
            client.log_artifact(run.info.run_id, os.fspath(file), FOLDER)
        client.set_tag(run.info.run_id, REPORT, content)
    return True
