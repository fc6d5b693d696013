"""What the report of a run says is what the folders hold, and it is made once."""

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from scipy import stats

from poemerge.errors import SettingError, SourceError
from tasks.report import known_details, write_report
from tasks.report.diagnostics import Detail, Look
from tasks.report.logged import log
from tasks.report.numbers import Numbers, gather
from tasks.report.page import Column, Section, Summary, Table, draw, render
from tasks.report.sections import sections, tails
from tasks.report.sections.scores import summary
from tasks.report.sources import Sources
from tests.flows.conftest import TASKS
from tests.tasks.reports import HOW, read

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the outputs of a run, and the working directory beside them."""
    shutil.copytree(finished_run / "artifacts", tmp_path / "artifacts")
    shutil.copy(finished_run / "mlflow.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("artifacts")


@pytest.fixture(scope="module")
def numbers(finished_run: Path) -> Numbers:
    return gather(Sources.find(finished_run / "artifacts", None, {}), seed=0)


class TestNumbers:
    def test_scores_are_the_leaderboards(self, numbers: Numbers, finished_run: Path) -> None:
        board = read(finished_run / "artifacts/register/leaderboard.json")
        assert numbers.best == board["best"]
        assert numbers.tasks == TASKS
        assert [(c.kind, c.label) for c in numbers.candidates] == [
            (row["kind"], row["label"]) for row in board["rows"]
        ]
        for found, row in zip(numbers.candidates, board["rows"], strict=True):
            assert found.scores == {t: by["test"]["score"] for t, by in row["scores"].items()}
            assert found.mean.low <= found.mean.mean <= found.mean.high
            assert found.mean.mean == pytest.approx(np.mean(list(found.scores.values())), abs=1e-6)
            assert found.kept == row["normalised"].get("test")

    def test_differences_are_from_the_best(self, numbers: Numbers) -> None:
        best, *others = numbers.of("merge")
        assert best.behind is None
        for row in (*others, *numbers.of("base")):
            assert row.behind.mean == pytest.approx(best.mean.mean - row.mean.mean)

    def test_merges_are_their_reports(self, numbers: Numbers, finished_run: Path) -> None:
        raw = read(finished_run / "artifacts/merge/cauchy_poe/merge_report.json")
        merge = numbers.merges["cauchy_poe"]
        tensors = {tensor["name"]: tensor for tensor in raw["tensors"]}
        assert len(merge.matrices) == 8
        for matrix in merge.matrices:
            assert [*matrix.norms.values(), matrix.merged] == tensors[matrix.name]["norms"]
            assert list(matrix.norms) == list(TASKS)
            assert sum(matrix.weights.values()) == pytest.approx(1)
        assert sum(merge.rules.values()) == len(raw["tensors"])


class TestPage:
    def test_everything_is_told(self, numbers: Numbers) -> None:
        told = {section.key: section for section in sections(numbers)}
        assert list(told) == ["leaderboard", "tasks", "weights", "energy", "cosines", "norms"]
        rows = told["leaderboard"].tables[0].rows
        best = numbers.of("merge")[0]
        assert rows[0][:2] == [best.label, 100 * best.mean.mean]
        facts = summary(numbers).facts.values()
        assert f"{100 * best.mean.mean:.1f} %" in facts
        for section in told.values():
            for table in section.tables:
                assert {len(row) for row in table.rows} == {len(table.columns)}

    def test_words_of_others_are_escaped(self) -> None:
        table = Table(
            "<i>", (Column("<b>", None), Column("n", ".2f")), [["<u>", 1 / 3], ["", None]]
        )
        said = Summary("<h>", ("a & b",), {}, {}, {"m": ("<script>alert(1)</script>",)})
        page = render("<t>", said, [Section("k", "<s>", ("<p>",), (), (table,))], {})
        for raw in ("<h>", "<i>", "<b>", "<u>", "<t>", "<s>", "<script>alert"):
            assert raw not in page
        assert 'data-value="0.3333333333333333">0.33<' in page
        assert 'data-value="">–<' in page

    def test_the_same_run_gives_the_same_bytes(self, run: Path) -> None:
        sources = Sources.find(run, None, {})
        assert write_report(sources, Path("again"), **HOW)
        names = sorted(path.name for path in Path("again").iterdir())
        assert {"index.html", "report.json", "leaderboard.png", "leaderboard-dark.png"} <= {*names}
        for name in names:
            assert Path("again", name).read_bytes() == (run / "report" / name).read_bytes(), name
        assert not write_report(sources, run / "report", **HOW)
        text = Path("again/index.html").read_text(encoding="utf-8")
        assert os.fspath(Path.cwd().parent) not in text
        assert "http" not in text.replace("http-equiv", "")


def described(nu: float, names: list[str]) -> dict[str, Any]:
    """Residuals as the core describes them: here those of a Student-t, fitted by scipy."""
    values = stats.t.rvs(nu, size=4000, random_state=0)
    sizes = np.sort(np.abs(values))
    edges = np.geomspace(sizes[4], sizes[-1], 31)
    centres = np.sqrt(edges[1:] * edges[:-1])
    density = np.histogram(sizes, edges)[0] / len(sizes) / np.diff(edges)
    families = {"gaussian": stats.norm, "cauchy": stats.cauchy, "student_t": stats.t}
    fits = {
        name: {
            "parameters": {},
            "log_likelihood": float(family.logpdf(values, *family.fit(values, floc=0)).mean()),
            "density": (2 * family.pdf(centres, *family.fit(values, floc=0))).tolist(),
        }
        for name, family in families.items()
    }
    shape = stats.weibull_min.fit(sizes, floc=0)
    fits["weibull"] = {
        "parameters": {},
        "log_likelihood": float(stats.weibull_min.logpdf(sizes, *shape).mean() - np.log(2)),
        "density": stats.weibull_min.pdf(centres, *shape).tolist(),
    }
    tail = {"estimate": nu, "standard_error": 0.1, "entries": 200}
    one = {"nu": nu, "tail_index": tail, "best": "student_t", "scale": 1.0, "left_out": ""}
    gap = {"nu": None, "tail_index": None, "best": None, "scale": 0.0, "left_out": "rounding"}
    return {
        "side": "output", "entries": len(sizes), "fits": fits, "nu": nu, "tail_index": tail,
        "histogram": {"edges": edges.tolist(), "density": density.tolist()},
        "best": "student_t", "verdict": f"Student-t with {nu} degrees of freedom describes it.",
        "tensors": dict.fromkeys(names[:-1], one) | {names[-1]: gap},
    }  # fmt: skip


class TestDiagnostics:
    @pytest.fixture
    def detailed(self, numbers: Numbers) -> Numbers:
        """With residuals and uncertainty of two merges."""
        shown = numbers.ranked[:2]
        names = [matrix.name for matrix in shown[0].matrices]
        tensors = {name: {"relative_std": 0.1 + i} for i, name in enumerate(names)}
        sure = {"tensors": tensors, "unit": "Part of the update."}
        found = [Detail("k", described(2.0 + i, names), sure) for i in range(2)]
        return replace(numbers, details={m.label: d for m, d in zip(shown, found, strict=True)})

    def test_they_are_shown_and_put_in_words(self, detailed: Numbers) -> None:
        section = tails.residuals(detailed)
        assert [p.name for p in section.pictures] == ["residuals", "freedom", "tail-index"]
        first, second = detailed.details
        assert section.words[1:] == (
            f"Under {first}: Student-t with 2.0 degrees of freedom describes it.",
            f"Under {second}: Student-t with 3.0 degrees of freedom describes it.",
        )
        assert "2 degrees of freedom" in section.pictures[0].alt
        fits, each = section.tables
        found = dict(zip([c.title for c in fits.columns], fits.rows[0], strict=True))
        assert found["Student-t"] > max(found[name] for name in ("Gaussian", "Cauchy", "Weibull"))
        assert each.rows[-1][1:4] == [None, None, None]
        assert each.rows[-1][-1] == "rounding"
        unsure = tails.uncertainty(detailed)
        assert detailed.merges[first].matrices[-1].name in unsure.words[0]
        drawn = draw([section, unsure])
        assert len(drawn) == 8
        assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())

    def test_nothing_to_fit_is_a_sentence(self, numbers: Numbers) -> None:
        nothing = {"best": None, "verdict": "There is nothing to fit."}
        told = tails.residuals(replace(numbers, details={numbers.best: Detail("k", nothing)}))
        assert told.words == [f"Under {numbers.best}: There is nothing to fit."]
        assert told.pictures == ()

    def test_what_is_known_is_not_computed_again(
        self, run: Path, numbers: Numbers, caplog: pytest.LogCaptureFixture
    ) -> None:
        sources, merge = Sources.find(run, None, {}), numbers.ranked[0]
        known = known_details(run / "report")
        assert [detail.residuals["side"] for detail in known.values()] == ["output"] * 2
        look = Look(sources.base, sources.experts, "output", 0, "cpu")
        with caplog.at_level(logging.INFO, logger="tasks.report"):
            found = look.into(sources.merges[merge.label], merge, known)
            assert found == known[found.key]
            assert not caplog.records
            other = replace(look, side="input").into(sources.merges[merge.label], merge, known)
        assert other.key not in known
        assert other.residuals["side"] == "input"
        assert [r.getMessage() for r in caplog.records] == [f"looking into {merge.label}"]
        (run / "report/report.json").write_text("{}")
        assert known_details(run / "report") == {}


class TestRefusals:
    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(SettingError, match="give the folder of a run"):
            Sources.find(tmp_path, None, {})

    def test_something_else_in_the_way(self, run: Path) -> None:
        (run / "mine").mkdir()
        (run / "mine/text").write_text("precious")
        with pytest.raises(SettingError, match="holds something else than a report"):
            write_report(Sources.find(run, None, {}), run / "mine", **HOW)
        assert (run / "mine/text").read_text() == "precious"

    def test_an_evaluation_made_since(self, run: Path) -> None:
        (run / "evaluate/merges/ties/items.json").write_text("{}")
        with pytest.raises(SourceError, match="compares another"):
            gather(Sources.find(run, None, {}), seed=0)

    def test_a_merge_made_since(self, run: Path) -> None:
        (run / "merge/ties/model.safetensors").write_bytes(b"other")
        with pytest.raises(SourceError, match="made from other bytes"):
            gather(Sources.find(run, None, {}), seed=0)

    def test_a_merge_that_is_gone(self, run: Path) -> None:
        shutil.rmtree(run / "merge/ties")
        with pytest.raises(SourceError, match="is not there any more"):
            Sources.find(run, None, {})


def test_it_is_logged_beside_its_leaderboard_once(run: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
    place = client.get_experiment_by_name("tests").experiment_id
    (parent,) = client.search_runs([place], "tags.`poemerge.stage` = 'register'")
    files = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert files == {
        f"report/{p.name}" for p in (run / "report").iterdir() if p.name != "lineage.json"
    }
    assert not log(run / "report", run / "register", "tests")
    client.set_tag(parent.info.run_id, "poemerge.report", "another")
    assert log(run / "report", run / "register", "tests")
    assert not log(run / "report", run / "register", "no such experiment")


def test_importing_the_stage_imports_nothing_heavy() -> None:
    heavy = {"mlflow", "matplotlib", "jinja2", "torch", "scipy"}
    code = f"import sys, tasks.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
