"""The doctor on servers that refuse, never answer, want a password, or are not there."""

import base64
import json
import threading
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

from flows.doctor.finding import Finding
from flows.doctor.services import hub, mlflow, prefect
from tests.flows.findings import SECRET, only


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
