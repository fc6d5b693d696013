"""The library at work: experts added by command, selected by tag, merged by the pipeline."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from ruamel.yaml import YAML

from flows.cli import main
from flows.cli.options import source_name
from flows.params import load
from flows.pipeline import pipeline
from flows.selection import find_places
from flows.stage import main as stage
from poemerge.errors import SettingError
from poemerge.layout import is_ready
from poemerge.lineage import Lineage, Source, produce
from tasks.fetch import fetch
from tests.flows.conftest import enter_copy, make_project

EXPERTS = Path("data/experts")


def poemerge(*arguments: object, code: int = 0) -> str:
    """Run a command as a user would; its output."""
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def add(name: str, *more: str, code: int = 0, unscored: bool = True) -> str:
    skip = ["--no-score"] if unscored else []
    arguments = [EXPERTS / name, "--task", name, "--tag", "team=nlp", *skip, *more]
    return poemerge("experts", "add", *arguments, code=code)


def change(**sections: dict[str, object]) -> None:
    """Write values into params.yaml."""
    yaml, path = YAML(), Path("params.yaml")
    tree = yaml.load(path)
    for section, values in sections.items():
        tree[section] |= values
    yaml.dump(tree, path)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    """A project whose experts are in the library, and selected from there; for reading only."""
    folder = make_project(tmp_path_factory.mktemp("library") / "project", zoo)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        add("red")
        add("blue")
        change(
            fetch={"experts": {}, "select": {"team": "nlp"}},
            merge={"methods": {"average": {}, "task_arithmetic": {"strength": 2.0}}},
        )
    return folder


@pytest.fixture
def shelf(stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the working directory in it."""
    return enter_copy(stocked, tmp_path, monkeypatch)


@pytest.fixture
def harness() -> Iterator[None]:
    with prefect_test_harness(120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.mark.usefixtures("harness")
def test_a_new_expert_that_matches_is_picked_up(shelf: Path, zoo) -> None:  # noqa: ANN001
    first = pipeline()
    assert {"fetch blue", "fetch red"} <= set(first["made"])
    record = Lineage.find(Path(first["merges"]["average"]))
    assert record is not None
    assert [source.uri for source in record.inputs[1:]] == ["models:/blue/1", "models:/red/1"]
    scores = Path("artifacts/evaluate/experts/red/results.json")
    scored = json.loads(scores.read_text())["scores"]["red"]["test"]["score"]
    assert f"{scored:.1%} on its own task" in add("red", unscored=False)

    shutil.copytree(zoo.adapter(3, noise=0.3), EXPERTS / "green")
    add("green")
    shutil.copytree(zoo.adapter(4, noise=0.3), EXPERTS / "red", dirs_exist_ok=True)
    add("red")
    second = pipeline()
    made = {"fetch green", "fetch red", "task_vectors", "merge average", "evaluate average"}
    assert made <= set(second["made"])
    assert not {"fetch base", "fetch blue", "evaluate base"} & set(second["made"])
    record = Lineage.find(Path(second["merges"]["average"]))
    assert record is not None
    assert [(source.name, source.uri) for source in record.inputs] == [
        ("base", "data/base"),
        ("blue", "models:/blue/1"),
        ("green", "models:/green/1"),
        ("red", "models:/red/2"),
    ]


def test_named_and_selected_experts_are_merged_together(shelf: Path) -> None:
    named = {"mine": {"source": "data/experts/blue"}, "chosen": {"source": "models:/red/1"}}
    change(fetch={"experts": named})
    places = find_places(Path("params.yaml"))
    assert places.is_plain
    fetch = places.params.fetch
    assert {name: expert.source for name, expert in fetch.experts.items()} == {
        "mine": "data/experts/blue",
        "chosen": "models:/red/1",
        "blue": "models:/blue/1",
    }
    add("blue", "--name", "azure")
    with pytest.raises(SettingError, match="both called blue"):
        find_places(Path("params.yaml"), ["fetch.experts.blue.source=elsewhere"])
    assert list(find_places(Path("params.yaml")).experts) == ["mine", "chosen", "azure", "blue"]


def test_what_a_selection_must_hold(shelf: Path) -> None:
    path = Path("params.yaml")
    with pytest.raises(SettingError, match="has team=law; `poemerge experts list`"):
        find_places(path, ["fetch.select.team=law"])
    weights = "merge.methods.average.weights"
    find_places(path, [f"{weights}.red=0.5"])
    with pytest.raises(SettingError, match=r"weights names 'rod' \(did you mean 'red'\?\);"):
        find_places(path, [f"{weights}.rod=0.5"])
    with pytest.raises(SettingError, match=r"fetch\.experts is empty; name some"):
        load(path, ["fetch.select=null"])


def test_a_stage_alone_selects_too(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage(["fetch", "red"]) == 0
    record = Lineage.find(Path("artifacts/fetch/experts/red"))
    assert record is not None
    assert record.uri == "models:/red/1"
    assert stage(["task_vectors"]) == 1  # as where DVC skipped fetch, since params.yaml is the same
    assert "experts/blue is not there; run `poemerge run`" in capsys.readouterr().err


def test_experts_of_another_base_are_refused_by_name(shelf: Path, zoo) -> None:  # noqa: ANN001
    shutil.copytree(zoo.full(9), "data/other")
    shutil.copytree(zoo.adapter(3), EXPERTS / "green")
    add("green", "--base", "data/other")
    with pytest.raises(SettingError, match=r"models:/green/1 is an expert of data/other, not of"):
        find_places(Path("params.yaml"))
    named = ["fetch.select=null", "fetch.experts.mine.source=models:/green/1"]
    with pytest.raises(SettingError, match=r"models:/green/1 is an expert of data/other, not of"):
        find_places(Path("params.yaml"), named)
    out = poemerge(
        "merge", "--base", "data/base", "--expert", "models:/green/1", "--out", "m", code=1
    )
    assert "models:/green/1 is an expert of data/other" in out
    out = poemerge("merge", "--base", "data/base", "--select", "team=nlp", "--out", "m", code=1)
    assert "models:/green/1 is an expert of data/other" in out
    other = Source.of("base", Path("data/other"))
    produce(
        EXPERTS / "trained",
        Lineage("train", {}, (other,)),
        lambda folder: shutil.copytree(EXPERTS / "green", folder, dirs_exist_ok=True),
    )
    assert "was made from" in add("trained", code=1)
    add("trained", "--base", "data/other")


def test_what_does_not_fit_the_base_is_refused(shelf: Path, zoo) -> None:  # noqa: ANN001
    shutil.copytree(zoo.base(), EXPERTS / "same")
    config = EXPERTS / "same/adapter_config.json"
    shutil.copytree(zoo.adapter(3), EXPERTS / "green")
    for file in (EXPERTS / "green").glob("adapter_model*"):
        file.unlink()
    assert "holds no model or adapter weights" in add("green", code=1)
    assert not config.exists()
    assert "is no name" in add("same", "--name", "a b", code=1)
    assert "task" in add("same", "--tag", "task=x", code=1)
    assert "write key=value" in add("same", "--tag", "x", code=1)
    assert not Path(".poemerge/library/add/same").exists()


def test_merging_on_demand(shelf: Path) -> None:
    base = ("--base", "data/base")
    shown = poemerge("check", *base, "--select", "team=nlp", "--select", "task=red")
    assert "cauchy_poe of 1 experts" in shown
    poemerge("merge", *base, "--select", "team=nlp", "--expert", "x=data/experts/red", "--out", "m")
    record = Lineage.find(Path("m"))
    assert record is not None
    assert [source.name for source in record.inputs] == ["base", "x", "blue", "red"]
    assert "--select" in poemerge("merge", *base, "--out", "n", code=2)


def test_the_list(shelf: Path) -> None:
    add("blue", "--tag", "lang=en")
    shown = poemerge("experts", "list")
    assert "models:/blue/1" in shown
    assert "lang=en team=nlp" in shown
    (only,) = json.loads(poemerge("experts", "list", "--tag", "lang=en", "--json"))
    assert (only["name"], only["base"], only["score"]) == ("blue", "data/base", None)
    assert "models:/blue/1 was removed" in poemerge("experts", "remove", "blue/1")
    assert "has no such expert" in poemerge("experts", "list", "--tag", "lang=en")


def test_another_machine_has_what_was_pushed(shelf: Path, tmp_path: Path) -> None:
    assert "has no default DVC remote" in add("red", "--push", code=1)
    with Repo(".") as repo, repo.config.edit("repo") as config:
        config["remote"] = {"team": {"url": str(tmp_path / "remote")}}
        config["core"]["remote"] = "team"
    add("red", "--push")
    shutil.rmtree(".dvc/cache")
    assert fetch.fn("red", "models:/red/1", "copy")
    assert is_ready(Path("copy"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/experts/red", "red"),
        ("hf://org/red@main", "red"),
        ("models:/red@champion", "red"),
        ("models:/red/3", "red"),
        (f"dvc://artifacts/merge/ties/{'0' * 32}.dir", "ties"),
        ("dvc://artifacts/merge/ties@v1", "ties"),
        ("models/red/3", "3"),
    ],
)
def test_what_a_source_is_called(source: str, name: str) -> None:
    assert source_name(source) == name
