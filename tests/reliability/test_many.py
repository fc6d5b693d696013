"""Many experts, many tensors, many bytes: done in bounded memory, handles and time."""

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from poemerge.checkpoint import Checkpoint
from poemerge.layout import ADAPTER, SINGLE
from poemerge.merging.memory import OVERHEAD
from poemerge.merging.plan import plan_merge
from tasks.report import PAGE
from tasks.report.page import MOST_ROWS
from tests import reference
from tests.core.stacks import distance
from tests.reliability.many import (
    ALPHA,
    HUGE,
    MATRICES,
    RANK,
    adapters,
    full_experts,
    mixture,
    sparse,
    unrelated,
)
from tests.reliability.trials import Trials
from tests.reliability.work import CLI, Work, cached, child

EXPERTS = 200
CLOSE = 1e-4  # fp32 against fp64
API = """
import json, sys
from poemerge import merge_checkpoints
base, out, method, settings, *experts = sys.argv[1:]
merge_checkpoints(base, experts, out, method, "cpu", **json.loads(settings))
"""
PRODUCT = {"side": "output", "ridge": 0.1}
HEAVY = {**PRODUCT, "epsilon": 1.0, "rtol": 1e-8, "max_steps": 400}
SIMPLE: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "cauchy_poe": (HEAVY, partial(reference.cauchy_poe, scale="equivariant", epsilon=1.0)),
    "ties": ({"keep": 0.3}, partial(reference.ties, keep=0.3)),
    "gaussian_poe": (PRODUCT, reference.gaussian_poe),
    "tsv_m": ({}, reference.tsv_m),
    "average": ({}, reference.average),
    "knots_ties": ({"keep": 0.3}, partial(reference.knots_ties, keep=0.3)),
    "model_stock": ({}, reference.model_stock),
    "iso_c": ({}, reference.iso_c),
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("crowd")
    base, full = full_experts(root, EXPERTS)
    return {"base": base, "full": full, "lora": adapters(root, EXPERTS)}


class TestExperts:
    def test_two_hundred_are_merged_in_one(
        self, crowd: dict[str, Any], tmp_path: Path, trials: Trials
    ) -> None:
        """200 experts in one merge: 256 open files do, memory is as announced, numbers are right"""
        cases = [(kind, method) for method in SIMPLE for kind in ("lora", "full")]
        for number in trials(short=3, full=len(cases)):
            with trials.trial(number):
                self.merge(crowd, *cases[number], tmp_path / str(number), cli=number < 2)

    def merge(self, crowd: dict[str, Any], kind: str, method: str, out: Path, *, cli: bool) -> None:
        settings, slow = SIMPLE[method]
        base, experts = crowd["base"], crowd[kind]
        named = {expert.name: expert for expert in experts}
        with plan_merge(base, named, method, settings) as plan:
            announced = plan.peak_bytes()
        if cli:
            given = [word for expert in experts for word in ("--expert", expert)]
            given += [
                word for item in settings.items() for word in ("--set", "{}={}".format(*item))
            ]
            given += ["--base", base, "--method", method, "--out", out, "--device", "cpu"]
            used = child(CLI, "merge", *given)
        else:
            used = child(API, base, out, method, json.dumps(settings), *experts)
        assert used.peak <= announced
        weights, merged = load_file(base / SINGLE), load_file(out / SINGLE)
        for name in MATRICES:
            updates = [update(kind, expert, name, weights[name]) for expert in experts]
            one = [1.0] * len(updates)
            expected = slow(updates, one, **({"ridge": 0.1} if "ridge" in settings else {}))
            assert distance((merged[name] - weights[name]).double(), expected) < CLOSE


def update(kind: str, expert: Path, name: str, base: Tensor) -> Tensor:
    """A = W - W₀ (O, I), fp64 from what fp32 holds."""
    if kind == "full":
        with Checkpoint(expert) as checkpoint:
            return (checkpoint.read(name) - base).double()
    factors = load_file(expert / ADAPTER)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    down, up = (factors[f"{module}.lora_{x}.weight"].double() for x in "AB")
    return ALPHA / RANK * up @ down


class TestTensors:
    def test_thousands_take_their_share_of_time(self, tmp_path: Path, trials: Trials) -> None:
        """5,000 tensors checked, merged, traced, verified: twice as many, at most 3 x the time"""
        sizes = (1250, 2500, 5000) if trials.full else (400, 800)
        often = {"check": 3, "merge": 1, "lineage": 3, "verify": 3}
        for number in trials(short=2, full=2):
            with trials.trial(number):
                naming = (mixture, unrelated)[number]
                root = tmp_path / naming.__name__
                work = [Work(root / str(size), naming(size)) for size in sizes]
                for name, times in often.items():
                    work[0].seconds(name, 1)  # once for what is imported then
                    taken = [each.seconds(name, times) for each in work]
                    for few, many in pairwise(taken):
                        assert many <= 3 * few + 0.1, (name, taken)

    @pytest.mark.usefixtures("long")
    def test_the_page_stays_small(self, tmp_path: Path, trials: Trials) -> None:
        """The report on 5,000 tensors is a page of at most 4 MB, with tables of at most 400 rows"""
        for number in trials(short=1, full=1):
            with trials.trial(number):
                work = Work(tmp_path / "work", mixture(5000))
                work.merge()
                work.report()
                text = (work.root / "report" / PAGE).read_text()
                assert len(text) < 4e6
                for table in text.split("<table")[1:]:
                    assert table.count("<tr>") <= MOST_ROWS + 1
                assert f"the first {MOST_ROWS} of {len(work.shapes)}" in text
                told = json.loads((work.root / "report/report.json").read_text())
                assert len(told["merges"]["out"]["matrices"]) == len(work.shapes)


class TestBytes:
    def test_twenty_gigabytes_are_planned_from_a_sample(
        self, tmp_path: Path, trials: Trials
    ) -> None:
        """Three checkpoints of 21 GB are planned in seconds and 0.6 GB; 1 byte in 300 is read"""
        for number in trials(short=1, full=5):
            with trials.trial(number):
                root = tmp_path / str(number)
                used = child(CLI, "check", *arguments(root, shards=1 + 5 * number))
                assert used.seconds < 20
                assert used.peak < OVERHEAD + 2e8
                assert sum(map(cached, root.rglob("*.safetensors"))) < 3 * 20e9 / 300

    def test_who_is_refused_does_not_wait(self, tmp_path: Path, trials: Trials) -> None:
        """A refused merge of three checkpoints of 21 GB ends at once"""
        for number in trials(short=1, full=5):
            with trials.trial(number):
                given = arguments(tmp_path / str(number), shards=1 + 5 * number)
                out = tmp_path / f"out{number}"
                used = child(CLI, "merge", *given, "--out", out, "--set", "ridg=1", end=1)
                assert used.seconds < 30  # hashing them takes a minute
                assert not out.exists()


def arguments(root: Path, shards: int) -> list[object]:
    """A base and two experts for the command line."""
    base, *experts = (sparse(root / name, HUGE, shards) for name in ("base", "a", "b"))
    assert sum(file.stat().st_size for file in base.glob("*.safetensors")) > 20e9
    named = [word for expert in experts for word in ("--expert", expert)]
    return ["--base", base, *named, "--device", "cpu"]
