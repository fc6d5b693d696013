"""A tiny project with little to evaluate, before and after its first run."""

import shutil
from pathlib import Path

from tests.flows.conftest import EASY, keep_two_candidates, make_project


def new_project(folder: Path, zoo) -> Path:  # noqa: ANN001
    """Two candidates, of which the best is promoted by the run itself."""
    make_project(folder, zoo)
    keep_two_candidates(folder)
    params = (folder / "params.yaml").read_text().replace("limit: 6", "limit: 2")
    (folder / "params.yaml").write_text(params + EASY)
    return folder


def copy(source: Path, target: Path) -> Path:
    """A clone of a project, but for its MLflow."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"))
    return target


def before_registration(finished: Path, target: Path) -> Path:
    """A project in which all is done but registration and report."""
    folder = copy(finished, target)
    for stage in ("register", "report"):
        shutil.rmtree(folder / "artifacts" / stage)
    return folder
