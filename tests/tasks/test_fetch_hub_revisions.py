"""fetch from a hub: branches that move or stay, and the commits that they mean."""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest

from tasks.fetch import UnreachableError, fetched, resolve, resolved_once
from tests.tasks.hub import FIRST, MODEL, SECOND, SOURCE, Hub, record_of, run


def test_within_a_run_a_branch_means_one_commit(hub: Hub, tmp_path: Path) -> None:
    """What looks for changes, side by side, hands on to what downloads; fetched, it is given up."""

    def asked() -> int:
        return sum("/revision/main" in request for request in hub.requests)

    hub.commits[SECOND] = MODEL | {"config.json": b"{}"}
    with resolved_once(), resolved_once(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(copy_context().run, resolve, SOURCE).result() == FIRST
        hub.branches["main"] = SECOND
        assert resolve(SOURCE) == FIRST
        run(tmp_path / "out")
        assert fetched(tmp_path / "out") == FIRST
        assert asked() == 1
        assert resolve(SOURCE) == SECOND
    assert resolve(SOURCE) == SECOND
    assert asked() == 3


def test_an_unmoved_branch_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path / "out")
    hub.requests.clear()
    assert run(tmp_path / "out") is False
    assert hub.requests == ["GET /api/models/org/model/revision/main"]


def test_a_moved_branch_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path / "out")
    hub.commits[SECOND] = MODEL | {"config.json": b'{"model_type": "gpt2"}'}
    hub.branches["main"] = SECOND
    assert run(tmp_path / "out") is True
    assert record_of(tmp_path / "out").revision == SECOND
    assert (tmp_path / "out/config.json").read_bytes() == b'{"model_type": "gpt2"}'


def test_a_branch_resolves_to_its_commit_and_nothing_is_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(SOURCE) == FIRST
    hub.commits[SECOND], hub.branches["main"] = MODEL, SECOND
    assert resolve(SOURCE) == SECOND
    assert resolve(f"{SOURCE}@{FIRST}") == FIRST
    assert hub.downloads == []
    assert list(tmp_path.iterdir()) == []


def test_without_an_answer_the_intact_copy_says_the_revision(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "out"
    run(copy)
    hub.commits[SECOND], hub.branches["main"] = MODEL, SECOND
    assert resolve(SOURCE, copy=copy) == SECOND
    hub.faults += [503] * 20
    assert resolve(SOURCE, copy=copy) == fetched(copy) == FIRST
    assert "nobody could say so" in caplog.text
    with pytest.raises(UnreachableError):
        resolve(SOURCE)
    (copy / "config.json").write_text("{}")
    with pytest.raises(UnreachableError):
        resolve(SOURCE, copy=copy)


def test_a_pinned_commit_stays_where_it_is(hub: Hub, tmp_path: Path) -> None:
    hub.commits[SECOND] = MODEL | {"config.json": b"{}"}
    hub.branches["main"] = SECOND
    run(tmp_path / "out", f"{SOURCE}@{FIRST}")
    assert record_of(tmp_path / "out").revision == FIRST
    assert (tmp_path / "out/config.json").read_bytes() == MODEL["config.json"]
