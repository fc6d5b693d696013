"""The report and the model card of a merge: every number in them is true."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from poemerge.lineage import Lineage, Source
from poemerge.merge import merge_checkpoints
from tests.core.merges import copy, merge, rules, weights
from tests.zoo import Zoo


class TestReport:
    def test_is_the_file(self, zoo: Zoo, tmp_path: Path) -> None:
        report = merge(zoo, tmp_path / "out")
        stored = json.loads((tmp_path / "out/merge_report.json").read_text(), parse_constant=fail)
        assert [entry["name"] for entry in stored["tensors"]] == sorted(rules(report))
        assert stored["settings"]["epsilon"] == 0.1
        assert sum(report.rules.values()) == len(report.tensors)

    def test_every_solve_has_its_certificate(self, zoo: Zoo, tmp_path: Path) -> None:
        for tensor in merge(zoo, tmp_path / "out", rtol=1e-10).tensors:
            assert bool(tensor.certificate) == (tensor.rule in {"matrix", "vocabulary"})
            if tensor.certificate:
                assert tensor.certificate["converged"]
                assert tensor.certificate["residual"] < 1e-9
                assert sum(tensor.certificate["weights"]) == pytest.approx(1)
                largest = max(tensor.norms[:-1])
                growth = tensor.norms[-1] / largest
                assert tensor.certificate["growth"] == pytest.approx(growth, rel=1e-4)

    def test_norms_are_those_of_the_updates(self, zoo: Zoo, tmp_path: Path) -> None:
        report = merge(zoo, tmp_path / "out", strength=0.5)
        base, merged = weights(zoo.base()), weights(tmp_path / "out")
        experts = [weights(zoo.full(seed)) for seed in (1, 2, 3)]
        for tensor in report.tensors:
            updates = [e[tensor.name] - base[tensor.name] for e in [*experts, merged]]
            expected = [float(update.norm()) for update in updates]
            assert tensor.norms == pytest.approx(expected, rel=1e-3)

    def test_what_did_not_settle_is_said(self, zoo: Zoo, tmp_path: Path) -> None:
        report = merge(zoo, tmp_path / "out", max_steps=1, rtol=0.0)
        assert any("did not settle in 1 steps; raise `max_steps`" in w for w in report.warnings)

    def test_nearly_collinear_experts_are_said(self, zoo: Zoo, tmp_path: Path) -> None:
        """Two adapters that share their inputs' directions but not their outputs blow up."""
        folders = {}
        for name, other in {"a": 1, "b": 2}.items():
            folders[name] = copy(zoo.adapter(1), tmp_path / name)
            stored = load_file(folders[name] / "adapter_model.safetensors")
            source = load_file(zoo.adapter(other) / "adapter_model.safetensors")
            mixed = {
                key: factor + 1e-3 * source[key] if "lora_A" in key else source[key]
                for key, factor in stored.items()
            }
            save_file(mixed, folders[name] / "adapter_model.safetensors")
        settings = {"ridge": 1e-9, "side": "input"}
        report = merge_checkpoints(
            zoo.base(), folders, tmp_path / "out", "gaussian_poe", "cpu", **settings
        )
        assert any(
            "nearly collinear experts cause; compare a larger `ridge`" in w for w in report.warnings
        )
        assert any("has a system of condition" in w for w in report.warnings)

    def test_progress_is_told(self, zoo: Zoo, tmp_path: Path) -> None:
        told: list[tuple[int, int]] = []
        merge(zoo, tmp_path / "out", progress=lambda *counts: told.append(counts))
        assert told == sorted(told)
        assert told[-1] == (len(weights(zoo.base())),) * 2


class TestModelCard:
    def test_front_matter(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out")
        text = (tmp_path / "out/README.md").read_text()
        header = yaml.safe_load(text.split("---")[1])
        assert header["base_model"]
        assert "merge" in header["tags"]
        assert header["library_name"] == "transformers"
        assert "`e1`, `e2`, `e3`" in text

    def test_sources_of_a_hub(self, zoo: Zoo, tmp_path: Path) -> None:
        base, expert = copy(zoo.base(), tmp_path / "b"), copy(zoo.adapter(1), tmp_path / "e")
        Lineage("fetch", {}, (), "hf://org/tiny@main", "c" * 40).write(base)
        merge_checkpoints(base, {"law": expert}, tmp_path / "out", "cauchy_poe", output="adapter")
        text = (tmp_path / "out/README.md").read_text()
        header = yaml.safe_load(text.split("---")[1])
        assert header == {
            "base_model": "org/tiny",
            "base_model_relation": "merge",
            "library_name": "peft",
            "tags": ["merge", "poemerge", "cauchy_poe"],
        }
        record = Lineage.find(tmp_path / "out")
        row = f"| base | `hf://org/tiny@main` | `{'c' * 40}` | `{record.inputs[0].digest[:16]}` |"
        assert row in text
        assert f"| law |  |  | `{record.inputs[1].digest[:16]}` |" in text

    def test_a_copy_of_a_hub_and_a_folder(
        self, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was fetched from a copy of a hub's model is that model; a path is no name of one."""
        monkeypatch.chdir(tmp_path)
        copied, plain = copy(zoo.base(), Path("copied")), copy(zoo.base(), Path("models/plain"))
        hub = Lineage("fetch", {}, (Source("base", {}, "hf://org/tiny"),), "hf://org/tiny")
        source = Source("base", {}, "hf-mirror/tiny", "", asdict(hub))
        Lineage("fetch", {}, (source,), "hf-mirror/tiny").write(copied)
        names = []
        for base in (copied, plain):
            merge_checkpoints(base, [zoo.full(1)], Path("out"), "average", overwrite=True)
            names.append(yaml.safe_load(Path("out/README.md").read_text().split("---")[1]))
        assert [header["base_model"] for header in names] == ["org/tiny", "plain"]

    def test_certificates_are_summed_up(self, zoo: Zoo, tmp_path: Path) -> None:
        found = [t.certificate for t in merge(zoo, tmp_path / "out").tensors if t.certificate]
        text = (tmp_path / "out/README.md").read_text()
        steps, growth = (max(each[key] for each in found) for key in ("steps", "growth"))
        assert f"{len(found)} of {len(found)} matrices settled, in {steps} steps at most" in text
        assert f"update is {growth:.2f} times" in text
        merge(zoo, tmp_path / "ties", "ties")
        assert "settled" not in (tmp_path / "ties/README.md").read_text()

    def test_warnings_are_in_it(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", max_steps=1, rtol=0.0)
        assert "did not settle" in (tmp_path / "out/README.md").read_text()


def fail(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
