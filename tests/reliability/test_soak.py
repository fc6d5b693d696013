"""Merges on a schedule leave nothing behind but their records; benchmarks/soak does many."""

from pathlib import Path

import pytest

from benchmarks.soak.accounts import expected, found, problems
from benchmarks.soak.gauges import STEADY
from benchmarks.soak.run import Merged, soak
from benchmarks.soak.system import system
from tests.reliability.trials import Trials


@pytest.mark.usefixtures("long")
def test_a_merge_leaves_nothing_behind_but_its_records(tmp_path: Path, trials: Trials) -> None:
    """A scheduled merge leaves no process, open file, temporary file or ticket behind"""
    done: list[Merged] = []
    with system(tmp_path) as running:
        for number, merged in zip(trials(short=2, full=20), soak(running, 20), strict=False):
            with trials.trial(number):
                done.append(merged)
                first = done[0].readings
                assert {key: merged.readings[key] for key in STEADY} == {
                    key: first[key] for key in STEADY
                }
        with trials.trial("accounts"):
            assert problems(expected(done), found(running, done)) == []
