"""docs/howto/own-experts.md, followed to the letter with tiny models."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.cli import main
from tests.flows.conftest import CODE, ROOT

PAGE = (ROOT / "docs/howto/own-experts.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path, zoo, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ANN001
    """The repository without its data, the models where the page has them, its files written."""
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "data/experts").mkdir(parents=True)
    for name, made in (("base", zoo.base()), ("law", zoo.full(1)), ("code", zoo.full(2))):
        shutil.copytree(made, tmp_path / "models" / name)
    for name, text in FILE.findall(PAGE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_ends_in_a_registered_model(clone: Path) -> None:
    lines = re.findall(r"^poemerge .*$", PAGE, flags=re.MULTILINE)
    said = []
    with prefect_test_harness(180), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        for line in lines:
            done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
            assert done.exit_code == 0, (line, done.output)
            said.append(done.output)
    assert [line.split()[1] for line in lines] == ["check", "merge", "lineage", "run", "lineage"]
    assert (clone / "models/merged/model.safetensors").exists()
    assert (clone / "artifacts/report/index.html").exists()
    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    version = client.get_model_version_by_alias("law-and-code", "challenger")
    assert version.source.startswith("dvc://")
