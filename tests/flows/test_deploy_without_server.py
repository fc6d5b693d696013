"""What deploy refuses before a server is asked, and the files for one: prefect.yaml, units."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import environment_variables
from prefect import settings
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from flows.cli import QUIET, main
from tests.flows.deployments import SECRET
from tests.servers import free_port

ROOT = Path(__file__).parents[2]


def test_the_units_of_the_page_are_whole(tmp_path: Path) -> None:
    """systemd itself reads them, where it is installed; Prefect knows every variable."""
    page = (ROOT / "docs/schedule.md").read_text()
    blocks = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    names = re.findall(r"`/etc/(systemd/system/[\w-]+\.service|[\w-]+\.env)`", page)
    assert len(blocks) == len(names) == 4
    for name, block in zip(names, blocks, strict=True):
        if name.endswith(".env"):
            keys = [line.partition("=")[0] for line in block.splitlines()]
            assert all(hasattr(settings, key) for key in keys if key.startswith("PREFECT_"))
            assert all(is_known(key) for key in keys if key.startswith("MLFLOW_"))
            continue
        unit = tmp_path / Path(name).name
        unit.write_text(
            re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", block, flags=re.MULTILINE)
        )
        if program := shutil.which("systemd-analyze"):
            command = [program, "verify", str(unit)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout + done.stderr) == (0, "")


def is_known(key: str) -> bool:
    """True for a variable that MLflow reads."""
    found = getattr(environment_variables, key, None)
    return found is not None and found.name == key


class TestWithoutServer:
    @staticmethod
    def refusal(*arguments: str) -> str:
        refused = CliRunner().invoke(main, ["deploy", *arguments], catch_exceptions=False)
        assert refused.exit_code == 1
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    @staticmethod
    def project(folder: Path, monkeypatch: pytest.MonkeyPatch, **schedule: str) -> None:
        monkeypatch.chdir(folder)
        (folder / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
        tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
        tree["schedule"].update(schedule)
        YAML().dump(tree, folder / "params.yaml")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("cron", "61 * * * *"),
            ("cron", "at noon"),
            ("cron", "0 0 31 2 *"),
            ("timezone", "Mars/Olympus"),
        ],
    )
    def test_a_bad_schedule_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
    ) -> None:
        self.project(tmp_path, monkeypatch, **{key: value})
        assert f"params.yaml: schedule.{key} is '{value}'" in self.refusal("--local")

    def test_a_missing_schedule_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.project(tmp_path, monkeypatch)
        params = tmp_path / "params.yaml"
        params.write_text(params.read_text().partition("schedule:")[0])
        assert "has no section `schedule`" in self.refusal()

    @pytest.mark.parametrize("text", ["deployments: []", "name: x", "deployments: [{name: a}]"])
    def test_a_template_of_no_use_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        self.project(tmp_path, monkeypatch)
        (tmp_path / "prefect.yaml").write_text(text)
        assert "prefect.yaml must begin `deployments` with" in self.refusal()

    def test_a_server_must_be_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.project(tmp_path, monkeypatch)
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            assert "set PREFECT_API_URL, or use --local" in self.refusal()

    def test_a_server_that_is_away_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.project(tmp_path, monkeypatch)
        port = free_port()
        with temporary_settings({PREFECT_API_URL: f"http://me:{SECRET}@127.0.0.1:{port}/api"}):
            said = self.refusal()
        assert f"Prefect at http://127.0.0.1:{port}/api cannot be reached" in said
        assert SECRET not in said

    def test_local_means_this_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.project(tmp_path, monkeypatch)
        with temporary_settings({PREFECT_API_URL: "https://prefect.example.org/api"}):
            assert "names another machine" in self.refusal("--local")


def test_prefect_yaml_agrees_with_the_rest_of_the_house() -> None:
    safe = YAML(typ="safe", pure=True)
    (template,) = safe.load(ROOT / "prefect.yaml")["deployments"]
    schedule = safe.load(ROOT / "params.yaml")["schedule"]
    assert template["schedules"] == [{key: schedule[key] for key in ("cron", "timezone")}]
    assert template["work_pool"]["job_variables"]["env"].items() <= QUIET.items()
