"""Promotion as people meet it: after a run, in the terminal, and on its page."""

import json
import re
import shlex
from pathlib import Path

import pytest

from flows.console import console
from flows.doctor.decisions import decisions
from flows.overrides import save_values
from flows.params import load
from flows.pipeline import pipeline
from flows.places import Places
from flows.promote import after_run
from poemerge.hashing import hash_files
from tasks import promote
from tests.flows.conftest import EASY, PARAMS, TASKS
from tests.flows.promoting import call, set_gate
from tests.tasks.registry import add_version, aliases, client, new_repository

pytestmark = pytest.mark.usefixtures("prefect")


def test_a_run_ends_by_promoting_what_it_registered(project: Path) -> None:
    Path("params.yaml").write_text(PARAMS.format(base="data/base") + EASY)
    outcome = pipeline()["promotion"]
    assert (outcome["kind"], outcome["version"], outcome["champion"]) == ("promotion", 1, None)
    first = json.loads(Path("artifacts/evaluate/merges/average/items.json").read_text())

    # Fewer items, so the champion is evaluated again; and no gain is enough.
    methods = {"average": {}} if _best() != "average" else {"task_arithmetic": {}}
    champion = json.loads(Path(f"artifacts/evaluate/merges/{_best()}/items.json").read_text())
    assert first.keys() == champion.keys()
    changes = [(("evaluate", "limit"), 4), (("merge", "methods"), methods)]
    save_values(project / "params.yaml", [*changes, (("promote", "min_gain"), 1.0)])
    outcome = pipeline()["promotion"]
    assert (outcome["kind"], outcome["version"], outcome["champion"]) == ("refusal", 2, 1)
    gates = {gate["name"]: gate for gate in outcome["gates"]}
    assert [name for name, gate in gates.items() if not gate["passed"]] == ["gain"]
    again = json.loads(Path(".poemerge/promote/tiny/items.json").read_text())
    for task in TASKS:
        for key in ("ids", "outcomes"):
            assert again[task]["test"][key] == champion[task]["test"][key][:4]

    set_gate(min_gain=-1.0)
    params = load(Path("params.yaml"))
    assert after_run(Places(params, params), trial=True) is None
    assert aliases()["champion"] == 1


def _best() -> str:
    entry = json.loads(Path("artifacts/register/registration.json").read_text())
    return str(entry["candidate"])


def test_a_refusal_says_gate_numbers_and_margin(registry: None) -> None:
    set_gate(min_gain=0.5)
    refused = call("promote", "--reason", "try")
    assert refused.exit_code == 1
    (line,) = [line for line in refused.output.splitlines() if line.strip().startswith("gain")]
    assert line.split()[1] == "failed"
    wanted, found, margin = map(float, line.split()[2:5])
    assert wanted == 0.5
    assert margin == pytest.approx(found - wanted, abs=1e-4)
    assert "refused" in refused.output
    assert "champion: version 1" in refused.output
    assert aliases()["champion"] == 1


def test_a_record_that_lies_is_refused(registry: None) -> None:
    weights = hash_files(Path("artifacts/merge/two"))["model.safetensors"]
    blobs = [path for path in Path(".dvc/cache/files/md5").rglob("*") if path.is_file()]
    (record,) = [path for path in blobs if weights in path.read_text()]
    record.chmod(0o644)
    record.write_text(record.read_text().replace(weights, 64 * "0"))
    refused = call("promote")
    assert refused.exit_code == 1
    failed = [line.split()[0] for line in refused.output.splitlines() if " failed " in line]
    assert failed == ["lineage"]
    assert aliases()["champion"] == 1


def test_promote_roll_back_and_read_about_it(registry: None) -> None:
    done = call("promote", "--version", "2", "--reason", "better")
    assert done.exit_code == 0
    assert "promoted: version 2 of tiny is champion" in done.output
    assert "champion already" in call("promote").output
    back = call("rollback", "--reason", "worse after all")
    assert back.exit_code == 0
    assert aliases() == {"challenger": 2, "champion": 1}
    assert call("rollback").exit_code == 1

    table = call("audit")
    assert table.exit_code == 0
    assert "worse after all" in table.output
    assert "The chain is whole: 3 decisions, none changed." in table.output
    found = json.loads(call("audit", "--name", "tiny", "--json").output)
    assert [row["kind"] for row in found["decisions"]] == ["promotion", "promotion", "rollback"]
    assert [row["before"] for row in found["decisions"]][1:] == [
        row["hash"] for row in found["decisions"][:-1]
    ]
    assert found["problems"] == []


def test_the_doctor_looks_at_the_table(registry: None) -> None:
    (found,) = decisions()
    assert (found.status, found.said) == ("ok", "1 about tiny, none changed or missing")
    client().delete_model_version("tiny-decisions", "1")
    (found,) = decisions()
    assert found.status == "problem"
    assert "about tiny: Decision 1, " in found.said


def test_without_the_section_there_is_nothing_to_promote_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS.format(base="base"))
    done = call("promote")
    assert done.exit_code == 1
    assert "no section `promote`" in done.output


def test_params_have_the_gates() -> None:
    section = load(Path(__file__).parents[2] / "params.yaml").promote
    assert section is not None
    assert promote.Limits(**section.model_dump(exclude={"automatic"}))


class TestPage:
    """docs/promotion.md shows what happens."""

    PAGE = Path(__file__).parents[2] / "docs/promotion.md"

    @staticmethod
    def sessions(text: str) -> list[tuple[str, str]]:
        """Every command of the page with what it prints."""
        blocks = re.findall(r"```console\n\$ poemerge (.*?)\n(.*?)```", text, flags=re.DOTALL)
        return [(command, output) for command, output in blocks]

    @staticmethod
    def plain(output: str) -> str:
        """Without what differs from day to day, and without spaces at the ends of lines."""
        lines = re.sub(r"\d{4}-\d\d-\d\dT[\d:]{8}Z", "2026-01-01T12:00:00Z", output).splitlines()
        return "\n".join(line.rstrip() for line in lines if "INFO" not in line).strip()

    def test_its_sessions_are_real(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path
    ) -> None:
        text = self.PAGE.read_text(encoding="utf-8")
        (section,) = re.findall(r"```yaml\n(promote:.*?)```", text, flags=re.DOTALL)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "team")
        monkeypatch.setattr(console, "width", 100)
        new_repository(tmp_path, database)
        Path("params.yaml").write_text(PARAMS.format(base="base") + section)
        add_version("one", {"spam": 24, "era": 24})
        call("promote")
        coming = iter([{"spam": 30, "era": 21}, {"spam": 34, "era": 29}])
        for command, output in self.sessions(text):
            if command.startswith("promote"):
                add_version(command, next(coming))
            assert self.plain(call(*shlex.split(command)).stdout) == self.plain(output)
