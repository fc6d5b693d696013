"""What the pages of docs/ say is true: their code runs, their names exist, their links lead on."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from typing import ClassVar

import click
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

import poemerge
from flows.cli import main
from flows.overrides import parse_settings
from flows.params import load
from flows.sections import MergeParams
from poemerge.methods import METHODS, find
from poemerge.poe.certificate import Certificate
from poemerge.poe.settings import HeavySettings, ProductSettings
from tests.core.stacks import assert_close

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [page for part in ("", "howto") for page in sorted((DOCS / part).glob("*.md"))]


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """The code blocks of a page in one language; none named is the shell."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)
    return [code for spoken, code in found if spoken == language]


def run(page: str) -> dict[str, object]:
    """Execute the Python of a page, block after block, as a reader would."""
    space: dict[str, object] = {}
    exec(compile("\n".join(blocks(page, "python")), f"docs/{page}", "exec"), space)
    return space


def rows(page: str, header: str) -> Iterator[list[str]]:
    """Cells of the table that begins with this header."""
    _, _, rest = read(page).partition(header + "\n")
    assert rest, f"{page} has no table {header}"
    for line in rest.splitlines()[1:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def commands() -> list[list[str]]:
    """Every call of poemerge that a page shows, split as a shell does."""
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    lines = chain.from_iterable(b.splitlines() for page in pages for b in blocks(page))
    return [shlex.split(line, comments=True) for line in lines if line.startswith("poemerge ")]


def test_all_code_is_executed() -> None:
    executed = {*TestNewMethods.CHECKS, "family.md", "certificates.md", "residuals.md", "walk.md"}
    executed.add("lineage.md")
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert {page for page in pages if blocks(page, "python")} == executed


class TestNewMethods:
    """A page's file, put into a copy of the package, does what the page says."""

    CHECKS: ClassVar = {
        "adding-a-method.md": """
merged = merge("largest", deltas, floor=0.0)
say = torch.tensor([1.0, 3.0, 0.5]).double()
by_hand = deltas.gather(1, (say[:, None, None] * deltas.abs()).argmax(1, keepdim=True))[:, 0]
assert torch.equal(merged.update.dense(), by_hand)
assert torch.equal(merge("largest", deltas[:, :, :4]).update.dense(), by_hand[:, :4])
assert METHODS["largest"].local
assert not merge("largest", deltas, floor=100.0).update.dense().any()
""",
        "adding-an-energy.md": """
from itertools import pairwise
from poemerge.methods.geman_mcclure_poe import GemanMcClure
trust, scale = torch.tensor([[[1.0, 0.5, 0.0]], [[0.1, 2.0, 1.0]]], dtype=torch.float64)
tail = GemanMcClure(trust, scale)
for size in (0.0, 1e-3, 0.3, 1.0, 40.0):
    q = torch.full((1, 3), size, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(tail.energy(q).sum(), q)
    torch.testing.assert_close(tail.weights(q), 2 * slope)
    (bend,) = torch.autograd.grad(tail.weights(q).sum(), q)
    assert (bend <= 0).all()
for side in ("input", "output"):
    for scale in ("equivariant", "paper", "estimated"):
        for epsilon in (0.01, 0.1, 1.0):
            settings = {"side": side, "scale": scale, "epsilon": epsilon}
            (found,) = merge("geman_mcclure_poe", deltas, **settings).certificates
            rounding = 1e-12 + 10 * found["noise"]
            assert all(after <= before + rounding for before, after in pairwise(found["energies"]))
            assert found["converged"] and found["residual"] < 1e-5, (settings, found)
wide = merge("geman_mcclure_poe", deltas, epsilon=1e9).update.dense()
torch.testing.assert_close(wide, merge("cauchy_poe", deltas, epsilon=1e9).update.dense())
near = merge("geman_mcclure_poe", deltas, epsilon=0.3).update.dense()
assert not torch.allclose(near, merge("cauchy_poe", deltas, epsilon=0.3).update.dense(), rtol=1e-2)
""",
    }
    START = """
import torch
from poemerge.method import Call
from poemerge.methods import METHODS
from poemerge.task_vector import DenseStack

def merge(name, deltas, **settings):
    method, say = METHODS[name], torch.tensor([[1.0, 3.0, 0.5]], dtype=torch.float64)
    assert method.summary.endswith(".") and method.source
    return method.merge(DenseStack(deltas), method.settings.parse(settings), Call(say))

deltas = torch.randn(1, 3, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""

    @pytest.mark.parametrize("page", CHECKS)
    def test_the_file_works(self, page: str, tmp_path: Path) -> None:
        (code,) = blocks(page, "python")
        name = re.search(r"^@register.*?^def (\w+)", code, flags=re.DOTALL | re.MULTILINE)
        assert name
        shutil.copytree(Path(poemerge.__file__).parent, tmp_path / "poemerge")
        (tmp_path / f"poemerge/methods/{name[1]}.py").write_text(code, encoding="utf-8")
        script = self.START + self.CHECKS[page]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("page", CHECKS)
    def test_the_file_is_in_the_house_style(self, page: str, tmp_path: Path) -> None:
        (code,) = blocks(page, "python")
        file = tmp_path / "method.py"
        file.write_text(code, encoding="utf-8")
        ruff = [sys.executable, "-m", "ruff"]
        config = ["--config", str(ROOT / "pyproject.toml"), str(file)]
        for command in (["format", "--check"], ["check", "--no-cache", "--ignore", "INP001"]):
            done = subprocess.run(
                [*ruff, *command, *config], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Where the code of family.md has run, and its variables."""
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run("family.md")


@pytest.fixture
def merged(made: tuple[Path, dict]) -> Path:
    return made[0]


class TestFamily:
    @staticmethod
    def weights(folder: Path, kind: str) -> tuple[list, list]:
        """Weights and curvature of both experts."""
        tuned = [load_file(folder / n / "model.safetensors") for n in ("law", "code")]
        return tuned, [load_file(folder / f"{n}.{kind}.safetensors") for n in ("law", "code")]

    def test_curvature_is_what_its_name_says(self, made: tuple[Path, dict]) -> None:
        """Of the last expert: inputs by hand, and the Fisher of a bias that has a closed form."""
        folder, space = made
        data, model = space["data"], space["model"]
        inner = model[1](model[0](data)).detach()
        given = load_file(folder / "code.inputs.safetensors")
        assert given.keys() == {"0.weight", "2.weight"}
        assert_close(given["0.weight"], data.T @ data / len(data))
        assert_close(given["2.weight"], inner.T @ inner / len(data))
        information = load_file(folder / "code.fisher.safetensors")
        assert information.keys() == model.state_dict().keys()
        slopes = model[2](inner).softmax(dim=-1)  # of logsumexp in the last layer's bias
        assert_close(information["2.bias"], slopes.square().mean(dim=0).detach())

    def test_activations_give_regmean(self, merged: Path) -> None:
        tuned, given = self.weights(merged, "inputs")
        result = load_file(merged / "regmean" / "model.safetensors")
        for name in ("0.weight", "2.weight"):
            total = sum(g[name].double() for g in given)
            right = sum(
                w[name].double() @ g[name].double() for w, g in zip(tuned, given, strict=True)
            )
            assert_close(result[name], torch.linalg.solve(total, right, left=False), 1e-4)
        assert_close(result["0.bias"], (tuned[0]["0.bias"] + tuned[1]["0.bias"]) / 2)

    def test_fisher_gives_fisher_merging(self, merged: Path) -> None:
        tuned, given = self.weights(merged, "fisher")
        result = load_file(merged / "fisher" / "model.safetensors")
        for name, tensor in result.items():
            total = given[0][name] + given[1][name]
            mean = sum(w[name] * f[name] for w, f in zip(tuned, given, strict=True)) / total
            assert_close(tensor, mean, 1e-4)

    def test_presets_are_as_shown(self) -> None:
        shown = {
            cells[0].strip("`"): cells[1] for cells in rows("family.md", "| `preset` | sets |")
        }
        assert shown.keys() == ProductSettings.presets.keys()
        for preset, values in ProductSettings.presets.items():
            extra = HeavySettings.presets[preset]
            for name, value in {**values, **extra}.items():
                assert f"`{name}: {value}`" in shown[preset]

    def test_every_precision_tail_and_granularity_is_named(self) -> None:
        text = read("family.md")
        choices = {f: ProductSettings.__dataclass_fields__[f].metadata["choices"]
                   for f in ("precision", "granularity", "side")}  # fmt: skip
        assert all(f"`{c}`" in text or f"side: {c}" in text for cs in choices.values() for c in cs)
        assert all(f"`{name}`" in text for name in METHODS if name.endswith("_poe"))

    def test_parameters_are_accepted(self) -> None:
        shown = blocks("family.md", "yaml")
        assert len(shown) == 2
        rest = {"device": "cpu", "dtype": "source", "strength": 1.0, "seed": 0, "memory": None}
        for block in shown:
            methods = YAML(typ="safe", pure=True).load(block)["merge"]["methods"]
            params = MergeParams(**rest, methods=methods)
            for label in methods:
                method, settings = params.candidate(label)
                find(method).settings.parse(settings)


def test_every_command_is_accepted() -> None:
    """Its options are there; what it sets is a setting of the method, or a key of params.yaml."""
    shown = commands()
    assert len(shown) > 10
    for words in shown:
        command = command_of(words[1:])
        options = {name for p in command.params for name in p.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
        given = [b for a, b in pairwise(words) if a == "--set"]
        if "--params" in options:
            load(ROOT / "params.yaml", given)
        elif given:
            method = words[words.index("--method") + 1] if "--method" in words else "cauchy_poe"
            find(method).settings.parse(parse_settings(given))


def command_of(words: list[str]) -> click.Command:
    """The command that words begin with, `experts add` say."""
    command: click.Command = main
    for word in words:
        if not isinstance(command, click.Group):
            break
        assert word in command.commands, words
        command = command.commands[word]
    return command


def test_patterns_on_the_command_line_mean_what_the_page_says() -> None:
    text = """weights={law: {"*.layers.0.*": 0, "*.mlp.*": 0.5}, code: 2}"""
    assert f"'{text}'" in read("family.md")
    settings = find("cauchy_poe").settings.parse(parse_settings([text]))
    names = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "norm.weight",
    )
    assert [settings.weight_of("law", name) for name in names] == [0, 0.5, 1]
    assert settings.weight_of("code", "norm.weight") == 2


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


@pytest.mark.parametrize("cells", list(rows("maths.md", "| symbol | meaning | name | file |")))
def test_every_name_of_the_index_exists(cells: list[str]) -> None:
    symbol, _, names, files = cells
    modules = [
        import_module("poemerge." + file.strip().removesuffix(".py").replace("/", "."))
        for file in files.split(",")
        if file.strip() != "-"
    ]
    known = {name for method in METHODS.values() for name, *_ in method.settings.describe()}
    for name in re.findall(r"`([\w.]+)`", names):
        assert name in known or any(_has(module, name) for module in modules), (symbol, name)


def _has(module: object, name: str) -> bool:
    found = module
    for part in name.split("."):
        if part in getattr(found, "__dataclass_fields__", {}):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
