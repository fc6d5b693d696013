"""What is told of the zoos is what was measured, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.results import page
from benchmarks.results.measure import PARAMS, Zoo
from flows.params import load

ROOT = Path(__file__).parents[1]
MEASURED = {path.stem: json.loads(path.read_text()) for path in (ROOT / page.MEASURED).glob("*")}


def test_the_page_says_what_was_measured() -> None:
    zoos = [MEASURED[name] for name in sorted(MEASURED)]
    assert page.page(zoos) == (ROOT / page.PAGE).read_text(encoding="utf-8")


def test_the_readme_says_it_too() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \|.*?\| ([\d.]+ \[[\d., ]+\]) \|", readme, re.MULTILINE))
    tests = {row["label"]: row["test"] for row in MEASURED["lora-0"]["tuned"]}
    assert shown == {
        label: f"{100 * t['mean']:.1f} [{100 * t['low']:.1f}, {100 * t['high']:.1f}]"
        for label, t in tests.items()
    }


@pytest.mark.parametrize("zoo", [Zoo("lora", 0), Zoo("full", 1)])
def test_what_is_measured_is_a_params_file(zoo: Zoo) -> None:
    params = load(ROOT / PARAMS, zoo.overrides(limit=None))
    assert params.evaluate.tasks == list(params.fetch.experts)
    assert params.evaluate.limit is None
    assert set(params.sweep.space) == set(params.merge.methods) - {"average"}


def test_every_expert_beats_the_base_on_its_own_task() -> None:
    for zoo in MEASURED.values():
        assert all(zoo["experts"][task][task] > zoo["base"][task] for task in zoo["tasks"])
