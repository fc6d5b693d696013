from pathlib import Path

import pytest

from flows.overrides import parse_settings, save_overrides
from flows.params import load
from flows.places import Places
from flows.steps import STAGES
from poemerge.errors import SettingError
from tests.flows.conftest import PARAMS, ROOT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.format(base="data/base"))
    return path


def test_the_shipped_file_is_sound() -> None:
    params = load(ROOT / "params.yaml")
    assert tuple(params.sections) == STAGES


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("merge.methodz=1", "unknown key merge.methodz (did you mean 'methods'?)"),
        ("fetsh={}", "unknown key fetsh (did you mean 'fetch'?)"),
        (
            "fetch.experts.red.sorce=x",
            "unknown key fetch.experts.red.sorce (did you mean 'source'?)",
        ),
        ("merge.methods.ties.kep=1", "Unknown setting 'kep' (did you mean 'keep'?)"),
        ("merge.methods.tise={}", "Unknown method 'tise' (did you mean 'ties'?)"),
        ("merge.methods.ties.keep=1.5", "keep is 1.5; it must be between 0 and 1"),
        ("merge.methods.ties.weights.rad=1", "names 'rad' (did you mean 'red'?)"),
        ("evaluate.limit=many", "evaluate.limit: input should be a valid integer, got 'many'"),
        ("evaluate.limit=0", "evaluate.limit"),
        ("register.choose=best", "register.choose"),
        ("fetch.base.sha256=12", "fetch.base.sha256"),
        ("merge.methods={a/b: {method: ties}}", "merge.methods"),
        ("merge", "is no assignment"),
        ("merge.seed=[", "has a value that is no YAML"),
    ],
)
def test_what_is_refused_and_how(file: Path, override: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        load(file, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "merge: {}\nmerge: {}\n"])
def test_a_file_that_is_no_parameter_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SettingError, match=r"broken\.yaml"):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="does not exist"):
        load(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(file: Path) -> None:
    assert load(file).merge.candidate("gaussian_poe")[1]["ridge"] == 1e-2
    assert load(file, ["merge.strength=3e-1"]).merge.strength == 0.3


def test_strength_of_the_section_and_of_a_candidate(file: Path) -> None:
    merge = load(file, ["merge.strength=0.7"]).merge
    assert merge.candidate("ties")[1]["strength"] == 0.7
    assert merge.candidate("task_arithmetic")[1]["strength"] == 0.5


def test_a_label_may_differ_from_its_method(file: Path) -> None:
    merge = load(file, ["merge.methods.other_side={method: cauchy_poe, side: input}"]).merge
    assert merge.candidate("other_side") == ("cauchy_poe", {"strength": 1.0, "side": "input"})


def test_settings_on_the_command_line() -> None:
    given = ["epsilon=1e-2", "side=input", "weights.red=2"]
    assert parse_settings(given) == {"epsilon": 0.01, "side": "input", "weights": {"red": 2}}


def test_saved_overrides_keep_remarks_and_order(file: Path) -> None:
    save_overrides(file, ["merge.methods.ties.keep=0.3", "evaluate.limit=null"])
    text = file.read_text()
    assert "# of the merged update" in text
    assert text.index("fetch:") < text.index("register:")
    params = load(file)
    assert params.merge.methods["ties"] == {"keep": 0.3}
    assert params.evaluate.limit is None


def test_overrides_move_only_what_they_change(file: Path) -> None:
    plain = load(file)
    places = Places(load(file, ["merge.methods.ties.keep=0.3"]), plain)
    assert places.base == Path("artifacts/fetch/base")
    assert places.merge("average") == Path("artifacts/merge/average")
    assert places.evaluation("merge", "average") == Path("artifacts/evaluate/merges/average")
    assert places.merge("ties").is_relative_to(".poemerge/runs")
    assert places.evaluation("merge", "ties").is_relative_to(".poemerge/runs")
    assert places.register.is_relative_to(".poemerge/runs")
    limited = Places(load(file, ["evaluate.limit=null"]), plain)
    assert limited.merge("ties") == Path("artifacts/merge/ties")
    assert limited.evaluation("base", "base").is_relative_to(".poemerge/runs")
    fetched = Places(load(file, ["fetch.dtype=float16"]), plain)
    assert fetched.merge("ties").is_relative_to(".poemerge/runs")
    assert Places(plain, plain).register == Path("artifacts/register")


def test_where_shards_are_made_decides_no_stage(file: Path) -> None:
    elsewhere = load(file, ["runtime={runner: dask, workers: null, address: 'tcp://host:8786'}"])
    assert elsewhere.runtime is not None
    assert elsewhere.sections == load(file).sections
    assert Places(elsewhere, load(file)).is_plain
    with pytest.raises(SettingError, match=r"runtime\.runner"):
        load(file, ["runtime={runner: spark, workers: null, address: null}"])
