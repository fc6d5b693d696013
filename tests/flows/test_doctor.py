"""The doctor: what is missing is said, with what to do; nothing hangs, and no secret is shown."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.doctor import CHECKS, examine
from flows.doctor.decisions import decisions
from flows.doctor.finding import Finding
from flows.doctor.packages import device, packages
from flows.doctor.project import data, folders, git, remote
from flows.doctor.services import hub, mlflow, prefect
from tests.flows.findings import SECRET, only


class TestPackages:
    @staticmethod
    def install(folder: Path, name: str, version: str) -> None:
        """As pip leaves it, before the real one on the path."""
        record = folder / f"{name}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )

    def test_what_is_installed_here_fits(self) -> None:
        assert only(packages()).status == "ok"

    @pytest.mark.parametrize(
        ("name", "version", "words"),
        [
            ("fastapi", "0.155.1", "no Prefect server starts"),
            ("sqlalchemy", "2.1.0", "schedules never fire"),
            ("transformers", "6.0.0", "is outside"),
        ],
    )
    def test_what_does_not_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str, words: str
    ) -> None:
        self.install(tmp_path, name, version)
        monkeypatch.syspath_prepend(tmp_path)
        found = only(packages())
        assert (found.name, found.status) == (name, "problem")
        assert found.said.startswith(version)
        assert words in found.said
        assert found.advice.startswith(f'pip install "{name}')

    def test_an_extra_out_of_range_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(tmp_path, "pytest", "1.0")
        monkeypatch.syspath_prepend(tmp_path)
        assert only(packages()).status == "warning"

    def test_the_device_is_torchs(self) -> None:
        import torch

        found = only(device())
        for index in range(torch.cuda.device_count()):
            assert torch.cuda.get_device_name(index) in found.said
        if not torch.cuda.is_available():
            assert f"cpu, {torch.get_num_threads()} threads" in found.said or "driver" in found.said


class TestProject:
    def test_git(self, project: Path) -> None:
        assert only(git()).advice.startswith("git init")
        subprocess.run(["git", "add", "-A"], check=True)
        subprocess.run(["git", "commit", "-qm", "all"], check=True)
        assert only(git()).said.endswith("nothing edited")
        (project / "params.yaml").write_text("edited: 1")
        assert only(git()).said.startswith("1 file differs")

    def test_dvc(self, project: Path) -> None:
        found = only(data())
        assert (found.status, found.advice) == ("warning", "poemerge run")
        (project / "dvc.yaml").write_text("stages: 3")
        assert only(data()).status == "problem"

    def test_no_dvc(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert "dvc init" in only(data()).advice
        assert list(remote()) == []

    def test_remotes(self, project: Path, closed: str, silent: str) -> None:
        def use(url: str) -> Finding:
            command = [sys.executable, "-m", "dvc", "remote", "add", "-q", "-f", "-d", "shelf", url]
            subprocess.run(command, check=True)
            return only(remote())

        assert "dvc remote add" in only(remote()).advice
        assert use(str(project.parent / "shelf")).status == "ok"
        (project.parent / "file").touch()
        assert use(str(project.parent / "file" / "shelf")).status == "problem"
        assert "cannot be reached" in use(f"http://me:{SECRET}@{closed}/shelf").said
        assert "does not answer" in use(f"http://me:{SECRET}@{silent}/shelf").said

    def test_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "file" / "cache"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
        found = {finding.name: finding for finding in folders()}
        assert found["POEMERGE_CACHE"].status == "problem"
        assert found["HF_HOME"].said.startswith(str(tmp_path / "not" / "yet"))

    @pytest.mark.parametrize(("free", "status"), [(5e8, "problem"), (5e9, "warning"), (5e10, "ok")])
    def test_room(self, monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
        class Usage:
            def __init__(self, _: Path) -> None:
                self.free = free

        monkeypatch.setattr("shutil.disk_usage", Usage)
        assert {finding.status for finding in folders()} == {status}


def test_a_check_that_hangs_or_breaks_costs_a_line() -> None:
    def hangs() -> Iterator[Finding]:
        time.sleep(1000)
        yield Finding("never", "said")

    def breaks() -> Iterator[Finding]:
        raise RuntimeError("of its own")

    def works() -> Iterator[Finding]:
        yield Finding("works", "well")

    found = examine({"hangs": hangs, "breaks": breaks, "works": works}, limit=1.0)
    assert [finding.status for finding in found] == ["problem", "problem", "ok"]
    assert "no answer in 1 s" in found[0].said
    assert "RuntimeError, of its own" in found[1].said


def test_the_command_ends_though_a_server_is_silent(project: Path, silent: str) -> None:
    command = [sys.executable, "-m", "flows.cli", "doctor"]
    address = f"http://me:{SECRET}@{silent}"
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": address,
        "PREFECT_API_URL": f"{address}/api",
    }
    ran = [
        subprocess.run(
            [*command, *more],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for more in ((), ("--json",))
    ]
    assert [done.returncode for done in ran] == [1, 1]
    assert all(SECRET not in done.stdout + done.stderr for done in ran)
    findings = json.loads(ran[1].stdout)
    assert {"packages", "device", "MLflow", "Prefect", "DVC", "git", "project"} <= {
        finding["name"] for finding in findings
    }
    problems = [finding["name"] for finding in findings if finding["status"] == "problem"]
    assert problems == ["MLflow", "Prefect"]
    assert "does not answer in 3 s" in ran[0].stdout
    assert "→ start it, or correct MLFLOW_TRACKING_URI" in ran[0].stdout


def test_every_check_is_in_the_list() -> None:
    assert set(CHECKS.values()) == {
        packages,
        device,
        mlflow,
        decisions,
        prefect,
        hub,
        data,
        remote,
        git,
        folders,
    }
