"""fetch from a hub that fails, breaks off, refuses or is away: what may pass, and what is left."""

import logging
from pathlib import Path

import huggingface_hub
import pytest

from poemerge.errors import SourceError
from poemerge.hashing import hash_files
from tasks.fetch import OfflineError, UnreachableError
from tests.tasks.hub import FIRST, MODEL, SECOND, SOURCE, Handler, Hub, record_of, run


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_fault_that_may_pass_is_unreachable(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults = [status]
    with pytest.raises(UnreachableError, match=f"answers with status {status}"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_fault_in_mid_download_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.broken["model.safetensors"] = 503
    with pytest.raises(UnreachableError, match="answers with status 503"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_download_that_breaks_off_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.short.add("model.safetensors")
    with pytest.raises(UnreachableError, match="broke off"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_fault_while_refetching_keeps_the_old_copy(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path / "out")
    hub.commits[SECOND] = dict(MODEL)
    hub.branches["main"] = SECOND
    hub.corrupt.add("model.safetensors")
    with pytest.raises(SourceError):
        run(tmp_path / "out")
    assert record_of(tmp_path / "out").revision == FIRST
    assert record_of(tmp_path / "out").outputs == hash_files(tmp_path / "out")


def test_a_refusal_is_not_a_passing_fault(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [403]
    with pytest.raises(SourceError, match="status 403") as caught:
        run(tmp_path / "out")
    assert not isinstance(caught.value, UnreachableError)


def test_a_closed_file_is_not_a_passing_fault(hub: Hub, tmp_path: Path) -> None:
    hub.closed.add("model.safetensors")
    with pytest.raises(SourceError, match="status 403") as caught:
        run(tmp_path / "out")
    assert not isinstance(caught.value, UnreachableError)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Handler, "describe", lambda self, _: self.answer(200, "<html>Log in</html>")
    )
    with pytest.raises(UnreachableError, match="JSONDecodeError"):
        run(tmp_path / "out")


def test_the_third_attempt_succeeds(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [500, 500]
    for _ in range(2):
        with pytest.raises(UnreachableError):
            run(tmp_path / "out")
    assert run(tmp_path / "out") is True


def test_nobody_listening(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="cannot be reached"):
        run(tmp_path / "out")


def test_switched_off(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE is set"):
        run(tmp_path / "out")
    assert not hub.requests


def test_an_intact_copy_is_kept_while_the_hub_is_away(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING, logger="tasks.fetch"):
        assert run(tmp_path / "out") is False
    assert "was kept" in caplog.text
    with pytest.raises(OfflineError):
        run(tmp_path / "out", f"{SOURCE}@{FIRST}")
    with pytest.raises(OfflineError):
        run(tmp_path / "out", sha256="0" * 64)
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(OfflineError):
        run(tmp_path / "out")
