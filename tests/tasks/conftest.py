"""A real run on tiny models for what reads one: every stage as `dvc repro` calls it."""

import os
from pathlib import Path

import pytest

from tests.flows.conftest import make_project


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    """The project after all stages; for reading only."""
    from flows.params import load
    from flows.places import Places
    from flows.steps import STAGES, steps

    folder = make_project(tmp_path_factory.mktemp("run") / "project", zoo)
    before = Path.cwd()
    os.chdir(folder)
    try:
        params = load(Path("params.yaml"))
        for stage in STAGES:
            for step in steps(stage, Places(params, params)):
                step.run()
    finally:
        os.chdir(before)
    return folder
