"""How far a step is, told by a real merge."""

import logging
from pathlib import Path

import pytest

from poemerge.checkpoint import Checkpoint
from tasks import progress
from tasks.merge import merge
from tests.zoo import Zoo

HOW = {"settings": {}, "device": "cpu", "dtype": "source", "seed": 0, "memory": None}
HOW |= {"vocabulary": "refuse", "foreign": "refuse", "runtime": {}}


def merge_two(zoo: Zoo, out: Path) -> int:
    """Merge two adapters; how many tensors there are."""
    experts = {"a": str(zoo.adapter(1)), "b": str(zoo.adapter(2))}
    assert merge.fn(str(zoo.base()), experts, str(out), method="average", **HOW)
    with Checkpoint(zoo.base()) as base:
        return len(base.tensors)


def test_who_watches_is_told_up_to_the_last_piece(
    zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, str, int, int]] = []
    with progress.watched_by(lambda *news: told.append(news)):
        total = merge_two(zoo, tmp_path / "merged")
    assert {(step, unit, last) for step, unit, _, last in told} == {
        ("merge merged", "tensors", total)
    }
    done = [count for _, _, count, _ in told]
    assert done == sorted(done)
    assert done[-1] == total
    assert not caplog.records


def test_without_a_watcher_there_is_a_line_now_and_then(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tasks.progress")
    monkeypatch.setattr(progress, "NEWS_EVERY", 0.0)
    total = merge_two(zoo, tmp_path / "merged")
    assert caplog.messages[-1] == f"merge merged: {total} of {total} tensors"
    caplog.clear()
    monkeypatch.setattr(progress, "NEWS_EVERY", 3600.0)
    merge_two(zoo, tmp_path / "again")
    assert caplog.messages == []
