"""`poemerge plan`: from folders, from a config.json, for machines that are not here."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.scale.__main__ import CASES, PAGE, page
from flows.cli import main
from flows.planning import rates_of
from poemerge.checkpoint import Checkpoint
from poemerge.errors import SettingError, SourceError
from poemerge.methods import METHODS
from tasks.fetch.headers import open_headers
from tests.zoo import Zoo, config

ROOT = Path(__file__).parents[2]
RATES = ["bandwidth=1", "hashing=1e9", "single=1", "double=1", "memory=1e9"]


def plan(*arguments: object, code: int = 0) -> str:
    options = [word for rate in RATES for word in ("--rate", rate)]
    result = CliRunner().invoke(main, ["plan", *map(str, arguments), *options])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("tied", [False, True])
def test_a_config_is_enough(zoo: Zoo, tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "config.json"
    config(tied=tied).save_pretrained(tmp_path)
    ghost = open_headers(str(path), tmp_path / "ghost")
    with Checkpoint(ghost) as imagined, Checkpoint(zoo.base(tied=tied)) as real:
        shapes = [{i.name: i.shape for i in c.tensors.values()} for c in (imagined, real)]
    assert shapes[0] == shapes[1]


def test_what_it_takes_is_told(zoo: Zoo) -> None:
    base = zoo.base("bfloat16", sharded=True)
    shown = plan("--base", base, "--experts", 3, "--rank", 2, "--workers", 2)
    assert "cauchy_poe of 3 experts" in shown
    assert "a shard each" in shown
    found = json.loads(plan("--base", base, "--experts", 3, "--workers", 3, "--json"))
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert 0.9 * 4 * size < found["cost"]["read"] < 4 * size  # the base and three like it
    assert list(found["schedules"]) == ["1", "2", "3"]
    one, *_, three = found["schedules"].values()
    assert three["seconds"] < one["seconds"] < 3.01 * three["seconds"]
    placed = [file for load in three["jobs"] for file in load]
    assert sorted(placed) == sorted(path.name for path in base.glob("*.safetensors"))


def test_methods_are_compared(zoo: Zoo) -> None:
    shown = plan("--base", zoo.base(), "--experts", 3, "--workers", 2, "--method", "all")
    assert "every method, of 3 experts, 2 workers" in shown
    rows = [line.split()[1] for line in shown.splitlines() if line.startswith("│")]
    assert sorted(rows) == sorted(METHODS)
    found = json.loads(plan("--base", zoo.base(), "--experts", 3, "--method", "all", "--json"))
    times = [found[name]["schedules"]["1"]["seconds"] for name in rows]
    assert times == sorted(times)
    assert found["tsv_m"]["cost"]["double"] > 0 == found["ties"]["cost"]["double"]


def test_more_storage_or_bandwidth_is_quicker(zoo: Zoo) -> None:
    base = zoo.base("bfloat16", sharded=True)
    common = ("--base", base, "--experts", 2, "--method", "average", "--workers", 2, "--json")
    fast = json.loads(plan(*common))["schedules"]["2"]
    slow = json.loads(plan(*common, "--storage", 0.001))["schedules"]["2"]
    assert slow["seconds"] > 5 * fast["seconds"]
    assert slow["bottleneck"] == "reading"


def test_real_experts_and_imagined_ones(zoo: Zoo) -> None:
    given = ("--expert", zoo.adapter(1), "--expert", f"two={zoo.full(2)}", "--experts", 1)
    assert "cauchy_poe of 3 experts" in plan("--base", zoo.base(), *given)


def test_what_cannot_be_planned_is_one_sentence(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo.base()
    assert "Give --expert or --experts" in plan("--base", base, code=2)
    assert "cannot be planned with" in plan("--base", tmp_path, "--experts", 1, code=1)
    unknown = tmp_path / "config.json"
    unknown.write_text('{"model_type": "nothing"}')
    assert "describes no model" in plan("--base", unknown, "--experts", 1, code=1)
    unknown.write_text("[1]")
    with pytest.raises(SourceError, match="describes no model"):
        open_headers(str(unknown), tmp_path / "ghost")
    for text in ("speed=1", "single=fast", "single=0", "single"):
        with pytest.raises(SettingError, match="is no rate; write bandwidth"):
            rates_of([text], "cpu")


def test_rates_that_are_not_given_are_measured() -> None:
    found = rates_of(["single=7"], "cpu")
    assert found.single == 7e9
    assert min(found.bandwidth, found.hashing, found.double, found.memory) > 1e6


def test_the_page_on_scale_says_what_its_command_gives() -> None:
    known = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    wanted = [case for case in CASES if case.model == "70 B" and case.method != "ties"]
    for row in page(wanted).splitlines():
        assert row in known
