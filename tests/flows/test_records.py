"""The commands that tell where a model comes from, on folders; tests/tasks has registered ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from flows.cli import main
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage


def poemerge(*arguments: object) -> Result:
    """Run a command as a user would; an exception that is not caught fails the test."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two experts of one matrix, a merge of them, and a merge of that merge."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for seed, name in enumerate(("base", "law", "code")):
        Path(name).mkdir()
        draw = torch.Generator().manual_seed(seed)
        save_file({"up.weight": torch.randn(6, 4, generator=draw)}, f"{name}/model.safetensors")
    merge("one", "law", "code", method="ties")
    merge("two", "one", "code", method="average")
    return tmp_path


def merge(out: str, *experts: str, method: str) -> None:
    given = [word for name in experts for word in ("--expert", name)]
    how = ("--method", method, "--device", "cpu", "--out", out)
    assert poemerge("merge", "--base", "base", *given, *how).exit_code == 0


@pytest.mark.usefixtures("folders")
class TestLineage:
    def test_the_tree_follows_a_merge_in_a_merge(self) -> None:
        said = poemerge("lineage", "two").output
        for words in ("two  merge average", "made by merge ties", "keep=0.2", "law", "torch 2"):
            assert words in said
        made = Lineage.find(Path("two"))
        for source in made.inputs:
            assert source.digest[:12] in said
            assert source.files["model.safetensors"][:12] in said
        assert made.outputs["model.safetensors"][:12] in said

    def test_json_has_the_same_and_more(self) -> None:
        told = json.loads(poemerge("lineage", "two", "--json").output)
        assert (told["ref"], told["stage"], told["key"]) == (
            *("two", "merge"),
            Lineage.find(Path("two")).key,
        )
        assert told["outputs"] == hash_files(Path("two"))
        one = told["sources"][1]["made"]
        assert one["params"]["method"] == "ties"
        assert [source["uri"] for source in one["sources"]] == ["base", "law", "code"]
        assert one["sources"][0]["files"] == hash_files(Path("base"))

    def test_diff_says_what_differs(self) -> None:
        said = poemerge("lineage", "--diff", "one", "two").output
        for words in ("params", "method", "ties", "average", "base, law, code", "base, one, code"):
            assert words in said
        assert "packages" not in said
        assert "one and one differ in nothing" in poemerge("lineage", "--diff", "one", "one").output
        told = json.loads(poemerge("lineage", "--diff", "one", "two", "--json").output)
        found = {(each["section"], each["key"]): (each["left"], each["right"]) for each in told}
        assert found["params", "method"] == ("ties", "average")

    def test_usage(self) -> None:
        assert poemerge("lineage", "one", "two").exit_code == 2
        assert poemerge("lineage", "one", "--diff").exit_code == 2
        assert poemerge("lineage", "base").exit_code == 1


@pytest.mark.usefixtures("folders")
class TestVerify:
    def test_the_exit_code_says_whether_it_holds(self) -> None:
        said = poemerge("verify", "two")
        assert said.exit_code == 0
        assert "0 missing, 0 changed" in said.output
        assert "law" in said.output  # a source of a source
        Path("law/model.safetensors").unlink()
        assert "missing law: model.safetensors" in poemerge("verify", "two").output
        assert poemerge("verify", "two").exit_code == 0
        Path("code/model.safetensors").write_bytes(b"x")
        changed = poemerge("verify", "two")
        assert changed.exit_code == 1
        assert "changed code: model.safetensors" in changed.output

    def test_a_file_of_its_own_that_is_gone(self) -> None:
        Path("two/README.md").unlink()
        gone = poemerge("verify", "two")
        assert gone.exit_code == 1
        assert "missing two: README.md" in gone.output

    def test_a_source_that_was_moved(self) -> None:
        Path("law").rename("elsewhere")
        assert "missing law" in poemerge("verify", "one").output
        found = poemerge("verify", "one", "--source", "law=elsewhere")
        assert "0 missing, 0 changed" in found.output
        assert poemerge("verify", "one", "--source", "law").exit_code == 1


@pytest.mark.usefixtures("folders")
class TestReproduce:
    def test_equal_bytes(self) -> None:
        done = poemerge("reproduce", "two", "--out", "again")
        assert done.exit_code == 0
        assert "reproduced: all 3 files are equal" in done.output
        assert Path("again/lineage.json").read_bytes() == Path("two/lineage.json").read_bytes()

    def test_nothing_is_left_without_out(self) -> None:
        before = set(Path().iterdir())
        assert poemerge("reproduce", "one").exit_code == 0
        assert set(Path().iterdir()) == before

    def test_what_differs_is_named(self) -> None:
        record = Lineage.find(Path("one"))
        save_file({"up.weight": torch.zeros(6, 4)}, "one/model.safetensors")
        record.write(Path("one"))
        done = poemerge("reproduce", "one")
        assert done.exit_code == 1
        assert "model.safetensors differs in up.weight" in done.output
        assert "1 of 3 files differ" in done.output

    def test_an_adapter_from_places_that_no_record_names(self, zoo) -> None:  # noqa: ANN001
        sources = ("--base", zoo.base(), "--expert", f"a={zoo.adapter(1)}")
        sources += ("--expert", f"b={zoo.adapter(2)}", "--out", "three", "--output", "adapter")
        assert poemerge("merge", *sources, "--samples", 1, "--set", "ridge=0.1").exit_code == 0
        given = [f"base={zoo.base()}", f"a={zoo.adapter(1)}", f"b={zoo.adapter(2)}"]
        where = [word for each in given for word in ("--source", each)]
        assert poemerge("reproduce", "three", *where).exit_code == 0
        refused = poemerge("reproduce", "three")
        assert refused.exit_code == 1
        assert "say where it lies: --source base=DIR" in refused.stderr
        refused = poemerge("reproduce", "three-samples/000", *where)
        assert "is a draw from a posterior" in refused.stderr


def key_pair(name: str) -> tuple[Path, Path]:
    private, public = Path(f"{name}.pem"), Path(f"{name}.pub")
    make = ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", str(private)]
    subprocess.run(make, check=True)
    show = ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)]
    subprocess.run(show, check=True, capture_output=True)
    return private, public


@pytest.mark.usefixtures("folders")
class TestSign:
    @pytest.fixture(autouse=True)
    def _extra(self) -> None:
        pytest.importorskip("model_signing.signing")  # which imports pyOpenSSL and names it not

    def test_a_signature_holds_until_a_file_is_touched(self) -> None:
        private, public = key_pair("team")
        before = Path("one/lineage.json").read_bytes()
        assert poemerge("sign", "one", "--key", private).exit_code == 0
        assert Path("one.sig").exists()
        assert Lineage.find(Path("one")).is_current(Path("one"))
        assert Path("one/lineage.json").read_bytes() == before
        good = poemerge("verify", "one", "--public-key", public)
        assert good.exit_code == 0
        assert "every file is as it was signed" in good.output
        for name in ("model.safetensors", "lineage.json"):
            kept = Path("one", name).read_bytes()
            Path("one", name).write_bytes(kept[:-1] + b" ")
            bad = poemerge("verify", "one", "--public-key", public)
            assert bad.exit_code == 1
            assert f"{name} differs" in bad.stderr
            Path("one", name).write_bytes(kept)
        Path("one/stray").write_text("x")
        assert "stray differs" in poemerge("verify", "one", "--public-key", public).stderr

    def test_refusals(self) -> None:
        private, public = key_pair("team")
        _, other = key_pair("other")
        inside = poemerge("sign", "one", "--key", private, "--signature", "one/x.sig")
        assert "lies in the folder that it signs" in inside.stderr
        assert "was not signed with" in poemerge("sign", "one", "--key", public).stderr
        nowhere = poemerge("sign", "one", "--key", "nowhere.pem").stderr
        assert "was not signed with nowhere.pem (No such file or directory)" in nowhere
        missing = poemerge("verify", "one", "--public-key", public)
        assert "one.sig does not exist; sign first" in missing.stderr
        poemerge("sign", "one", "--key", private)
        assert "another key" in poemerge("verify", "one", "--public-key", other).stderr
        assert "is no public key" in poemerge("verify", "one", "--public-key", private).stderr
        text = Path("one.sig").read_text()
        for forged in (text.replace('"sig":"', '"sig":"AAAA'), "{}", "not JSON"):
            assert forged != text
            Path("one.sig").write_text(forged)
            refused = poemerge("verify", "one", "--public-key", public)
            assert refused.exit_code == 1
            assert refused.stderr.startswith("error: ")
        assert poemerge("verify", "one", "--signature", "one.sig").exit_code == 2


@pytest.mark.usefixtures("folders")
def test_without_the_extra_signing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refused = poemerge("sign", "one", "--key", "team.pem")
    assert refused.exit_code == 1
    assert "run `pip install 'poemerge[sign]'`" in refused.stderr
