"""The gates against numbers that can be counted by hand, and certificates of real merges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from poemerge import merge_checkpoints
from tasks.paired import Outcomes
from tasks.promote.gates import certificates, drop, gain, intact
from tests.tasks.registry import outcomes


def scored(**right: int) -> Outcomes:
    """Tasks of 40 items, so many of which are right."""
    values = {task: tuple(outcomes(n)) for task, n in right.items()}
    ids = {task: tuple(f"{task} {i}" for i in range(len(v))) for task, v in values.items()}
    return Outcomes(ids, values)


def by_hand(left: Outcomes, right: Outcomes, level: float) -> tuple[float, float]:
    """A paired bootstrap in ten plain lines."""
    draw = np.random.default_rng(1)
    means = np.zeros(4000)
    for task, values in left.values.items():
        apart = np.subtract(values, right.values[task])
        for i in range(len(means)):
            means[i] += draw.choice(apart, len(apart)).mean() / len(left.values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def test_gain_is_the_lower_end_of_the_paired_interval() -> None:
    better, live = scored(odd=30, even=28), scored(odd=20, even=24)
    gate = gain(better, live, min_gain=0.02, level=0.9)
    low, _ = by_hand(better, live, 0.9)
    assert gate.found == pytest.approx(low, abs=0.01)
    assert gate.wanted == 0.02
    assert gate.margin == pytest.approx(gate.found - 0.02)
    assert gate.passed
    assert "+17.5 on the mean, 90% interval" in gate.sentence


@pytest.mark.parametrize(
    ("odd", "min_gain", "passes"),
    [
        (20, 0.0, False),  # the same answers gain nothing
        (20, -0.01, True),  # and lose nothing either
        (21, 0.0, False),  # one item more may be luck
        (40, 0.0, True),
        (40, 0.6, False),
        (10, -0.01, False),
    ],
)
def test_gain_wants_more_than_luck(odd: int, min_gain: float, passes: bool) -> None:
    gate = gain(scored(odd=odd), scored(odd=20), min_gain=min_gain, level=0.95)
    assert gate.passed is passes
    assert (gate.margin > 0) is passes


def test_a_first_version_has_nothing_to_gain_over_and_says_so() -> None:
    for gate in (gain(scored(odd=1), None, min_gain=0.5, level=0.95),
                 drop(scored(odd=1), None, max_drop=0.0)):  # fmt: skip
        assert gate.passed
        assert gate.found is gate.margin is None
        assert "no champion" in gate.sentence


def test_drop_is_that_of_the_worst_task() -> None:
    gate = drop(scored(odd=40, even=10), scored(odd=20, even=14), max_drop=0.05)
    assert not gate.passed
    assert gate.found == pytest.approx(0.1)
    assert gate.margin == pytest.approx(-0.05)
    assert gate.sentence == "even loses most, -10.0, where -5.0 is allowed"


def test_a_drop_of_just_the_limit_is_allowed() -> None:
    assert drop(scored(odd=36), scored(odd=38), max_drop=0.05).passed
    assert not drop(scored(odd=35), scored(odd=38), max_drop=0.05).passed


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(("base", "law", "code")):
        (folder / name).mkdir()
        draw = torch.Generator().manual_seed(seed)
        weight = {"up.weight": torch.randn(6, 4, generator=draw)}
        save_file(weight, folder / name / "model.safetensors")
    return folder


def report(experts: Path, out: Path, method: str, **settings: object) -> dict:
    given = {name: experts / name for name in ("law", "code")}
    merge_checkpoints(experts / "base", given, out, method=method, **settings)
    return json.loads((out / "merge_report.json").read_text())


def test_certificates_of_a_merge_that_settled_hold(experts: Path, tmp_path: Path) -> None:
    gate = certificates(report(experts, tmp_path / "out", "cauchy_poe"))
    assert (gate.passed, gate.wanted, gate.found, gate.margin) == (True, 1, 1, 0)


def test_a_merge_that_did_not_settle_is_named(experts: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "epsilon": 1e-3, "rtol": 1e-12}
    gate = certificates(report(experts, tmp_path / "out", "cauchy_poe", **settings))
    assert (gate.passed, gate.wanted, gate.found, gate.margin) == (False, 1, 0, -1)
    assert "up.weight" in gate.sentence


def test_energies_must_not_rise(experts: Path, tmp_path: Path) -> None:
    found = report(experts, tmp_path / "out", "cauchy_poe")
    certificate = found["tensors"][0]["certificate"]
    start = certificate["energies"][0]
    certificate["energies"] = [start, start * (1 + 1e-12)]
    assert certificates(found).passed
    certificate["energies"] = [start, start * (1 + 1e-6)]
    assert not certificates(found).passed


def test_an_average_has_nothing_to_certify(experts: Path, tmp_path: Path) -> None:
    gate = certificates(report(experts, tmp_path / "out", "average"))
    assert gate.passed
    assert "solves nothing" in gate.sentence


def test_problems_are_counted_and_the_first_is_said() -> None:
    gate = intact("lineage", ["The base changed.", "An expert is missing."])
    assert (gate.passed, gate.wanted, gate.found, gate.margin) == (False, 0, 2, -2)
    assert gate.sentence == "The base changed (and 1 more)"
