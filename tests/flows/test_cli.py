"""The command line: exit codes, one sentence for a refusal, no output left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from flows.cli import INTERRUPTED, Sentences, main
from poemerge.lineage import Lineage
from poemerge.methods import METHODS

HEAVY = ("torch", "prefect", "mlflow", "dvc", "lm_eval", "transformers", "pydantic", "rich")


def poemerge(*arguments: object) -> Result:
    """Run a command as a user would; an exception that is not caught fails the test."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def sources(zoo) -> list[object]:  # noqa: ANN001
    """The arguments that name a base and two adapters."""
    experts = (zoo.adapter(1), zoo.adapter(2))
    return ["--base", zoo.base(), "--expert", f"a={experts[0]}", "--expert", f"b={experts[1]}"]


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = f"import sys, flows.cli; print([m for m in {HEAVY} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


def test_merge_makes_a_folder(sources: list[object], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = poemerge("merge", *sources, "--out", out, "--set", "ridge=0.1", "--device", "cpu")
    assert done.exit_code == 0
    assert "2 experts merged by cauchy_poe" in done.output
    report = json.loads((out / "merge_report.json").read_text())
    assert report["experts"] == ["a", "b"]
    assert report["settings"]["ridge"] == 0.1


def test_merge_draws_samples(sources: list[object], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    draw = ("--samples", 2, "--temperature", 0.5, "--output", "adapter")
    done = poemerge("merge", *sources, "--out", out, *draw)
    assert done.exit_code == 0
    assert "2 draws from the posterior" in done.output
    drawn = tmp_path / "merged-samples" / "001"
    assert (drawn / "adapter_model.safetensors").exists()
    expected = {"draw": 1, "sampler": "laplace", "temperature": 0.5}
    assert Lineage.find(drawn).params["posterior"] == expected


def test_merge_makes_an_adapter(sources: list[object], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert poemerge("merge", *sources, "--out", out, "--output", "adapter").exit_code == 0
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "tise"], "did you mean 'ties'?"),
        (["--set", "epsilom=1"], "did you mean 'epsilon'?"),
        (["--set", "epsilon"], "is no assignment"),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--expert", "nowhere"], "nowhere"),
        (["--method", "ties", "--output", "adapter"], "ties makes dense updates"),
        (["--method", "ties", "--samples", "2"], "ties has no posterior"),
    ],
)
def test_a_refusal_is_one_sentence(
    sources: list[object], tmp_path: Path, arguments: list[str], words: str
) -> None:
    out = tmp_path / "out" / "merged"
    refused = poemerge("merge", *sources, "--out", out, *arguments)
    assert refused.exit_code == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_an_existing_folder_is_kept(sources: list[object], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    refused = poemerge("merge", *sources, "--out", tmp_path)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "mine").read_text() == "precious"


def test_usage_errors_exit_with_2(sources: list[object]) -> None:
    assert poemerge("merge", *sources).exit_code == 2
    assert poemerge("merg").exit_code == 2


def test_an_interrupt_exits_with_3(
    sources: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("poemerge.merge.merge_checkpoints", interrupt)
    stopped = poemerge("merge", *sources, "--out", tmp_path / "merged")
    assert stopped.exit_code == 3
    assert "to go on" in stopped.stderr


def test_check_says_what_would_happen(sources: list[object], zoo, tmp_path: Path) -> None:  # noqa: ANN001
    said = poemerge("check", *sources)
    assert said.exit_code == 0
    for words in ("matrix", "copy", "2 in factors, Σ rank 8", "peak memory", "on this machine"):
        assert words in said.output
    assert poemerge("check", *sources, "--expert", tmp_path).exit_code == 1
    assert "averaged" in poemerge("check", "--base", zoo.base(), "--expert", zoo.full(1)).output


def test_extract_makes_an_adapter(zoo, tmp_path: Path) -> None:  # noqa: ANN001
    out = tmp_path / "adapter"
    given = ["--base", zoo.base(), "--expert", zoo.full(1), "--out", out]
    done = poemerge("extract", *given, "--rank", 4, "--vectors", "drop", "--dtype", "bfloat16")
    assert done.exit_code == 0
    report = json.loads((out / "extract_report.json").read_text())
    assert report["params"]["rank"] == 4
    assert report["params"]["dtype"] == "bfloat16"
    said = " ".join(done.stdout.split())
    size = (out / "adapter_model.safetensors").stat().st_size / 1e6
    assert f"{out}: {size:.1f} MB" in said
    assert f"{report['mean_error']:.3f} on average" in said
    assert f"at worst ({report['worst']})" in said
    assert "dropped (vectors=drop)" in " ".join(done.stderr.split())
    merged = poemerge("merge", "--base", zoo.base(), "--expert", out, "--out", tmp_path / "merged")
    assert merged.exit_code == 0


def test_extract_refuses_in_one_sentence(zoo, tmp_path: Path) -> None:  # noqa: ANN001
    given = ["--base", zoo.base(), "--out", tmp_path / "a"]
    refused = poemerge("extract", *given, "--expert", zoo.adapter(1), "--rank", 4)
    assert refused.exit_code == 1
    assert "error: " in refused.stderr.splitlines()[-1]
    assert "is a PEFT adapter already" in refused.stderr
    assert poemerge("extract", *given, "--expert", zoo.full(1), "--rank", 0).exit_code == 1
    assert poemerge("extract", *given, "--expert", zoo.full(1)).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_methods_lists_all_with_their_settings() -> None:
    said = " ".join(poemerge("methods").output.split())
    for name, method in METHODS.items():
        assert name in said
        assert method.source in said
        assert all(setting in said for setting, _, _ in method.settings.describe())


def test_report_of_a_model(
    sources: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("click.launch", shown.append)
    out = tmp_path / "merged"
    poemerge("merge", *sources, "--out", out)
    page = tmp_path / "merged-report" / "index.html"
    done = poemerge("report", out, *sources, "--open")
    assert done.exit_code == 0
    assert page.is_file()
    assert done.output.strip().splitlines()[-1] == str(page)
    assert shown == [str(page)]
    assert "was up to date" in poemerge("report", out, *sources).output
    assert Lineage.find(out).outputs.keys() == {
        path.name for path in out.iterdir() if path.name != "lineage.json"
    }


def test_report_refuses_in_one_sentence(sources: list[object], tmp_path: Path) -> None:
    refused = poemerge("report", tmp_path)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert "give the folder of a run" in refused.stderr
    assert poemerge("report", tmp_path, *sources[:2]).exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_makes_an_error_of_is_one_all_the_same(number: int) -> None:
    @click.group(cls=Sentences)
    def group() -> None: ...

    @group.command()
    def draw() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ValueError("Invalid bounding box") from None

    before = signal.getsignal(number)
    result = CliRunner().invoke(group, ["draw"])
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "interrupted: run the same command again to go on.\n"
    assert signal.getsignal(number) is before
