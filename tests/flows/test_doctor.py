"""The doctor: what is missing is said, with what to do; nothing hangs, and no secret is shown."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect import __version__ as prefect_version
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    temporary_settings,
)

from flows.doctor import CHECKS, examine
from flows.doctor.decisions import decisions
from flows.doctor.finding import Finding
from flows.doctor.packages import device, packages
from flows.doctor.project import data, folders, git, remote
from flows.doctor.services import hub, mlflow, prefect

SECRET = "s3cret"


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


class Guarded(BaseHTTPRequestHandler):
    """Answers who knows the password, or the token."""

    def do_GET(self) -> None:
        basic = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
        known = self.headers.get("Authorization") in (basic, f"Bearer {SECRET}")
        body = json.dumps(prefect_version).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def guarded() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def prefect_at(address: str) -> Iterator[None]:
    settings = {PREFECT_API_URL: f"http://me:{SECRET}@{address}/api"}
    with temporary_settings(settings, restore_defaults={PREFECT_API_AUTH_STRING, PREFECT_API_KEY}):
        yield


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    assert SECRET not in f"{found.said}{found.advice}"
    return found


class TestServers:
    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def ask(self, address: str, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@{address}")
        monkeypatch.setenv("HF_ENDPOINT", f"http://{address}/?token={SECRET}")
        with prefect_at(address):
            return [only(mlflow()), only(prefect()), only(hub())]

    def test_one_that_refuses(self, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for found, variable in zip(
            self.ask(closed, monkeypatch),
            ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HF_ENDPOINT"),
            strict=True,
        ):
            assert found.status == "problem"
            assert closed in found.said
            assert "cannot be reached" in found.said
            assert found.advice == f"start it, or correct {variable}"

    def test_one_that_never_answers(self, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for found in self.ask(silent, monkeypatch):
            assert found.status == "problem"
            assert "does not answer in 3 s" in found.said

    def test_one_that_wants_a_password(self, guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
        address = f"http://{guarded}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
            anonymous = [only(mlflow()), only(prefect())]
        assert [found.status for found in anonymous] == ["problem", "problem"]
        assert all("refuses us, who came anonymously" in found.said for found in anonymous)
        assert "MLFLOW_TRACKING_PASSWORD" in anonymous[0].advice
        assert "PREFECT_API_AUTH_STRING" in anonymous[1].advice
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        settings = {PREFECT_API_URL: f"{address}/api", PREFECT_API_AUTH_STRING: f"me:{SECRET}"}
        with temporary_settings(settings):
            known = [only(mlflow()), only(prefect())]
        assert [found.status for found in known] == ["ok", "ok"]
        assert known[0].said == f"{address} answers, as me"

    def test_the_hub_may_be_met_anonymously(
        self, guarded: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_ENDPOINT", f"http://{guarded}")
        assert only(hub()).said == f"http://{guarded} answers, anonymously"
        monkeypatch.setenv("HF_TOKEN", SECRET)
        assert only(hub()).said == f"http://{guarded} answers, by HF_TOKEN"
        monkeypatch.setenv("HF_TOKEN", "expired")
        assert only(hub()).advice == "renew HF_TOKEN"

    def test_without_a_server_nothing_is_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            assert only(prefect()).status == "ok"
        assert only(mlflow()).status == "ok"
        assert list(tmp_path.iterdir()) == []  # looking makes nothing

    def test_a_broken_database(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
        found = only(mlflow())
        assert found.status == "problem"
        assert "mlflow.db" in found.said


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
