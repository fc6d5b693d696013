"""The command line on object storage: check, plan, merge there and back."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.cli import main
from poemerge.hashing import hash_files
from tests.storage import Storage
from tests.zoo import Zoo

RATES = ["bandwidth=1", "hashing=1e9", "single=1", "double=1", "memory=1e9"]


def command(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def sources(zoo: Zoo, storage: Storage) -> list[str]:
    base, first = (storage.upload(folder) for folder in (zoo.base(sharded=True), zoo.full(1)))
    return ["--base", base, "--expert", f"a={first}", "--expert", f"b={zoo.adapter(2)}"]


def test_there_and_back(
    zoo: Zoo, storage: Storage, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = storage.url("merged")
    assert "2 experts" in command("check", *sources)
    assert f"{out}: 2 experts merged by cauchy_poe" in command("merge", *sources, "--out", out)
    here = ["--base", zoo.base(sharded=True), "--expert", f"a={zoo.full(1)}"]
    here += ["--expert", f"b={zoo.adapter(2)}"]
    command("merge", *here, "--out", "here")
    found = hash_files(storage.download(out, tmp_path / "down"))
    assert {**found, "README.md": ""} == {**hash_files(Path("here")), "README.md": ""}
    assert f"error: {out} exists already" in command("merge", *sources, "--out", out, code=1)
    gone = command("merge", *sources, "--expert", "s3://none/c", "--out", "new", code=1)
    assert "error: s3://none/c does not exist" in gone
    assert "Traceback" not in gone


def test_a_plan_of_headers(sources: list[str]) -> None:
    rates = [word for rate in RATES for word in ("--rate", rate)]
    found = json.loads(command("plan", *sources, "--json", *rates))
    assert found["jobs"] == 7
    assert found["cost"]["read"] > 0


def test_what_was_merged_from_there_is_verified_and_made_again(
    zoo: Zoo, storage: Storage, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command("merge", *sources, "--out", "merged")
    told = ["merged", "--source", f"b={zoo.adapter(2)}"]  # of no address, since it was absolute
    assert " 0 missing" not in command("verify", *told)
    assert "0 missing, 0 changed" in command("verify", *told, "--remote")
    assert "equal, byte by byte" in command("reproduce", *told)
    url = storage.upload(zoo.full(2), zoo.full(1).name)
    changed = command("verify", *told, "--remote", code=1)
    assert f"changed {url}: model.safetensors" in changed
    refused = command("reproduce", *told, code=1)
    assert f"a ({url}) has other bytes in model.safetensors" in refused
