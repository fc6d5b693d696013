"""The examples of docs/ on certificates, residuals and lineage: they show what the pages say."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from flows.cli import main
from poemerge.poe.certificate import Certificate
from tests.doc_pages import blocks, read, rows, run


class TestCertificates:
    def test_every_number_is_explained(self) -> None:
        header = "| number | means | normal | otherwise |"
        explained = [cells[0].strip("`") for cells in rows("certificates.md", header)]
        empty = Certificate(0, True, (0.0,), (1.0,), 0.0, 1.0, (1.0,), 1.0, 0.0, "float32")
        assert explained == list(empty.as_dict())

    def test_the_example_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for seed, name in enumerate(("base", "law", "code")):
            Path(name).mkdir()
            draw = torch.Generator().manual_seed(seed)
            save_file({"up.weight": torch.randn(6, 4, generator=draw)}, f"{name}/model.safetensors")
        run("certificates.md")
        assert re.match(r"up\.weight growth \d\.\d \d+ steps \{'law'", capsys.readouterr().out)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the example of residuals.md finds on matrices of noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("residuals"))
        for seed, name in enumerate(("base", "law", "code", "chat")):
            Path(name).mkdir()
            moved = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
            weight = torch.eye(20, 30) + seed * moved / (seed or 1)
            save_file({"up.weight": weight}, f"{name}/model.safetensors")
        return run("residuals.md")["found"]


class TestResiduals:
    def test_the_example_has_a_verdict(self, found: dict) -> None:
        assert "describes these residuals best" in found["verdict"]

    def test_every_key_is_explained(self, found: dict) -> None:
        explained = {c[0].strip("`"): c[1] for c in rows("residuals.md", "| key | holds |")}
        assert set(explained) == set(found)
        inner = {
            "histogram": found["histogram"],
            "fits": found["fits"]["weibull"],
            "tail_index": found["tail_index"],
            "tensors": found["tensors"]["up.weight"],
        }
        for key, value in inner.items():
            assert set(re.findall(r"`(\w+)`", explained[key])) == set(value)

    def test_every_density_has_its_parameters(self, found: dict) -> None:
        header = "| name | density of r | parameters | how |"
        table = re.sub(r"\\\|", "", read("residuals.md"))
        _, _, rest = table.partition(header)
        for name, fit in found["fits"].items():
            (line,) = re.findall(rf"^\| `{name}` \|.*\|$", rest, flags=re.MULTILINE)
            assert set(re.findall(r"`(\w+)`", line)) == {name, *fit["parameters"]}


class TestLineage:
    """The sessions of lineage.md, word for word but for hashes and versions."""

    VARYING = re.compile(r"[0-9a-f]{12}…?|\d+(\.\d+)+(\+\w+)?")

    def test_the_commands_say_what_the_page_shows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run("lineage.md")
        for block in blocks("lineage.md", "console"):
            for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, shown = session.partition("\n")
                if command.startswith("poemerge sign"):
                    pytest.importorskip("model_signing.signing")
                assert self.masked(self.said(command)) == self.masked(shown), command

    @staticmethod
    def said(command: str) -> str:
        words = command.split()
        if words[0] != "poemerge":
            subprocess.run(words, check=True, capture_output=True)
            return ""
        done = CliRunner().invoke(main, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    def masked(self, text: str) -> list[list[str]]:
        return [self.VARYING.sub("#", line).split() for line in text.splitlines()]
