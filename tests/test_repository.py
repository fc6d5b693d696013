"""The house is what it says it is: one word per stage, a README that tells the truth."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from flows.cli import main
from flows.reference import FOLDER, pages
from flows.reference.parameters import keys
from flows.sections import AROUND, Params
from flows.steps import STAGES
from poemerge.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# what stands beside the stages in tasks/
SHARED = {
    "audit_table",
    "decisions",
    "dvc_store",
    "library",
    "paired",
    "runners",
    "progress",
    "promote",
    "provenance",
    "seq2seq",
    "sweep",
    "tracking",
    "versions",
}


def _keys(path: str) -> list[str]:
    return list(YAML(typ="safe").load(ROOT / path))


def test_one_word_per_stage() -> None:
    modules = {p.stem for p in (ROOT / "tasks").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__", "__pycache__"} - SHARED == set(STAGES)
    assert tuple(_keys("params.yaml")) == (*STAGES, *AROUND)
    assert tuple(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]) == STAGES
    assert tuple(f.alias or n for n, f in Params.model_fields.items()) == (*STAGES, *AROUND)


def test_no_module_beside_a_flow_hides_one_of_python() -> None:
    """Prefect puts a flow's folder first on the path, and a spawned process takes the path over."""
    beside = {path.stem for path in (ROOT / "flows").iterdir()}
    assert not beside & sys.stdlib_module_names - {"__init__"}


def test_the_readme_tree_is_the_real_tree() -> None:
    tree = re.search(r"```\n(poemerge/\n.*?)```", README, flags=re.DOTALL)
    assert tree, "README.md has no tree"
    shown = {line.split()[1].rstrip("/") for line in tree.group(1).splitlines()[1:]}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    real = {name.split("/")[0] for name in listed if (ROOT / name).exists()}
    hidden = {name for name in real if name.startswith(".") and name != ".ci"}
    assert shown == real - hidden - {"dvc.lock"}


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"poemerge {name}" in README


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_and_setting_is_documented(name: str) -> None:
    method = METHODS[name]
    assert method.summary
    assert method.source
    assert f"`{name}`" in README
    assert all(len(meaning) > 10 for _, _, meaning in method.settings.describe())


def test_the_reference_is_current() -> None:
    written = {page.name: page.read_text(encoding="utf-8") for page in FOLDER.iterdir()}
    assert written == pages(), "run `python -m flows.reference`"


def test_every_parameter_has_a_meaning() -> None:
    silent = [key.path for rows in keys().values() for key in rows if not key.meaning]
    assert not silent, "give each a remark in params.yaml, or a `description` in flows/sections.py"


def test_every_parameter_has_a_remark() -> None:
    lines = [line for line in (ROOT / "params.yaml").read_text().splitlines() if ":" in line]
    section = ""
    for line in lines:
        if re.match(r"\w", line):
            section = line.split(":")[0]
        elif re.match(r"  \w", line) and not line.rstrip().endswith(("base:", "{}")):
            assert "#" in line, f"{section}: {line.strip()} has no remark on its meaning or unit"


def test_the_walk_through_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile("\n".join(blocks), "docs/walk.md", "exec"), {})


def test_the_lowest_versions_are_within_what_is_stated() -> None:
    pins = (line.split("==") for line in (ROOT / ".ci/lowest.txt").read_text().splitlines())
    pinned = {canonicalize_name(pin[0]): pin[1] for pin in pins if len(pin) == 2}
    with (ROOT / "pyproject.toml").open("rb") as file:
        stated = [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]
    for each in stated:
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each


def test_ci_makes_what_the_makefile_has() -> None:
    work = YAML(typ="safe").load(ROOT / ".github/workflows/ci.yml")["jobs"]["make"]
    targets = set(work["strategy"]["matrix"]["target"])
    assert targets == {"test", "lowest", "docs", "audit"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
