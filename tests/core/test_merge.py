"""Merging folders: what is written, that it loads, and what its lineage says."""

import json
import platform
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from poemerge import METHODS, MergeReport
from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage, Source, produce
from poemerge.merge import expert_weights, merge_checkpoints, merge_lineage, name_experts
from poemerge.merging.memory import OVERHEAD
from poemerge.merging.plan import plan_merge
from tests.core.stacks import assert_close
from tests.zoo import Zoo

SIDE_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "lineage.json",
    "merge_report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHOICES = {
    "device": "cpu",
    "dtype": "source",
    "output": "full",
    "seed": 0,
    "rank": None,
    "memory": None,
}


def merge(
    zoo: Zoo, out: Path, method: str = "cauchy_poe", *seeds: int, **options: object
) -> MergeReport:
    """Merge full fine-tunes of the default base."""
    experts = {f"e{seed}": zoo.full(seed) for seed in seeds or (1, 2, 3)}
    return merge_checkpoints(zoo.base(), experts, out, method, "cpu", **options)


def weights(folder: Path) -> dict[str, Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def rules(report: MergeReport) -> dict[str, str]:
    return {tensor.name: tensor.rule for tensor in report.tensors}


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_output_is_complete_and_loads(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        report = merge(zoo, tmp_path / "out", method)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files == SIDE_FILES | {"model.safetensors"}
        stored = weights(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert all(torch.equal(weight, stored[n]) for n, weight in model.state_dict().items())
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [11, 12]
        assert len(report.tensors) == len(stored)
        base = weights(zoo.base())
        moved = [name for name in stored if not torch.equal(stored[name], base[name])]
        # Where experts of noise happen to point apart, Model Stock stays at the base.
        assert moved if method == "model_stock" else moved == list(stored)

    def test_sharded_is_single(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        merge(zoo, tmp_path / "single", method)
        base = zoo.base(sharded=True)
        experts = {f"e{seed}": zoo.full(seed, sharded=seed != 2) for seed in (1, 2, 3)}
        merge_checkpoints(base, experts, tmp_path / "sharded", method, "cpu")
        single, sharded = weights(tmp_path / "single"), weights(tmp_path / "sharded")
        assert single.keys() == sharded.keys()
        for name, weight in single.items():
            assert_close(sharded[name], weight, 1e-6)
        shards = {path.name for path in base.glob("*.safetensors")}
        files = {path.name for path in (tmp_path / "sharded").iterdir()}
        assert files == SIDE_FILES | shards | {"model.safetensors.index.json"}
        assert index(tmp_path / "sharded") == index(base)
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype="auto")

    def test_the_same_work_gives_the_same_bytes(
        self, zoo: Zoo, tmp_path: Path, method: str
    ) -> None:
        merge(zoo, tmp_path / "one", method, seed=5)
        merge(zoo, tmp_path / "elsewhere" / "two", method, seed=5)
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "elsewhere/two" / path.name).read_bytes()

    def test_order_of_experts_decides_nothing(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        merge(zoo, tmp_path / "one", method, 1, 2, 3)
        merge(zoo, tmp_path / "two", method, 3, 1, 2)
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name, weight in one.items():
            assert_close(two[name], weight)

    def test_adapters(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        """Adapters merge as the full checkpoints that they stand for."""
        experts = {f"e{seed}": zoo.adapter(seed) for seed in (1, 2)}
        report = merge_checkpoints(zoo.base(), experts, tmp_path / "out", method, "cpu")
        touched = {name for name, rule in rules(report).items() if rule != "copy"}
        assert touched == {name for name in rules(report) if "self_attn" in name}
        for name, folder in experts.items():
            whole = copy(zoo.base(), tmp_path / name)
            save_file(dict(expert_weights(zoo.base(), folder)), whole / "model.safetensors")
        full = {name: tmp_path / name for name in experts}
        merge_checkpoints(zoo.base(), full, tmp_path / "full", method, "cpu")
        actual, expected = weights(tmp_path / "out"), weights(tmp_path / "full")
        for name, weight in actual.items():
            assert_close(weight, expected[name], 1e-4)


def index(folder: Path) -> dict[str, object]:
    """The index of a sharded folder, without what only transformers adds."""
    raw = json.loads((folder / "model.safetensors.index.json").read_text())
    return {"size": raw["metadata"]["total_size"], "map": raw["weight_map"]}


class TestStoredDtype:
    def test_bf16_stays_bf16(self, zoo: Zoo, tmp_path: Path) -> None:
        experts = [zoo.full(1, "bfloat16"), zoo.full(2, "bfloat16")]
        merge_checkpoints(zoo.base("bfloat16"), experts, tmp_path / "out", "average", "cpu")
        stored = weights(tmp_path / "out")
        assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
        one, two = (weights(folder) for folder in experts)
        for name, weight in stored.items():
            assert_close(weight, ((one[name].float() + two[name].float()) / 2).bfloat16())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_another_dtype(self, zoo: Zoo, tmp_path: Path, dtype: str) -> None:
        merge(zoo, tmp_path / "source")
        report = merge(zoo, tmp_path / "out", dtype=dtype)
        for name, weight in weights(tmp_path / "source").items():
            assert torch.equal(weights(tmp_path / "out")[name], weight.to(getattr(torch, dtype)))
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
        assert {tensor.dtype for tensor in report.tensors} == {dtype}

    def test_copied_tensors_change_too(self, zoo: Zoo, tmp_path: Path) -> None:
        experts = [zoo.adapter(1)]
        merge_checkpoints(zoo.base(), experts, tmp_path / "o", "average", "cpu", dtype="float16")
        assert {w.dtype for w in weights(tmp_path / "o").values()} == {torch.float16}


class TestTiedHead:
    def test_tied_stays_tied(self, zoo: Zoo, tmp_path: Path) -> None:
        experts = [zoo.full(seed, tied=True) for seed in (1, 2)]
        merge_checkpoints(zoo.base(tied=True), experts, tmp_path / "out", device="cpu")
        assert "lm_head.weight" not in weights(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_stored_copy_is_dropped(self, zoo: Zoo, tmp_path: Path) -> None:
        folders = []
        for name, source in {"base": zoo.base(tied=True), "a": zoo.full(1, tied=True)}.items():
            folders.append(copy(source, tmp_path / name))
            stored = load_file(folders[-1] / "model.safetensors")
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
            save_file(stored, folders[-1] / "model.safetensors")
        base, expert = folders
        report = merge_checkpoints(base, [expert, zoo.full(2, tied=True)], tmp_path / "out")
        assert rules(report)["lm_head.weight"] == "tied"
        assert "lm_head.weight" not in weights(tmp_path / "out")
        plain = [zoo.full(1, tied=True), zoo.full(2, tied=True)]
        merge_checkpoints(zoo.base(tied=True), plain, tmp_path / "plain")
        for name, weight in weights(tmp_path / "plain").items():
            assert torch.equal(weights(tmp_path / "out")[name], weight)
        assert not any("lm_head" in warning for warning in report.warnings)

    def test_a_shard_with_nothing_but_the_copy_is_not_written(
        self, zoo: Zoo, tmp_path: Path
    ) -> None:
        base = copy(zoo.base(tied=True, sharded=True), tmp_path / "base")
        embedding = weights(base)["model.embed_tokens.weight"]
        save_file({"lm_head.weight": embedding.clone()}, base / "model-head.safetensors")
        path = base / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        table["weight_map"]["lm_head.weight"] = "model-head.safetensors"
        path.write_text(json.dumps(table))
        merge_checkpoints(base, [zoo.full(1, tied=True)], tmp_path / "out", "average")
        assert not (tmp_path / "out/model-head.safetensors").exists()
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_an_adapted_tied_head_is_refused(self, zoo: Zoo, tmp_path: Path) -> None:
        expert = zoo.adapter(1, tied=True, target_modules=["q_proj", "lm_head"])
        pattern = "Expert 'a' .* changes lm_head.weight apart from the other end of the tie"
        with pytest.raises(CheckpointError, match=pattern):
            merge_checkpoints(zoo.base(tied=True), {"a": expert}, tmp_path / "out", "average")

    def test_untied_heads_are_merged(self, zoo: Zoo, tmp_path: Path) -> None:
        assert rules(merge(zoo, tmp_path / "out"))["lm_head.weight"] == "vocabulary"


class TestRules:
    def test_of_a_structured_method(self, zoo: Zoo, tmp_path: Path) -> None:
        found = rules(merge(zoo, tmp_path / "out", side="output"))
        assert found.pop("model.embed_tokens.weight") == "vocabulary"
        assert found.pop("lm_head.weight") == "vocabulary"
        for name, rule in found.items():
            assert rule == ("average" if "norm" in name else "matrix"), name

    def test_vectors_are_averaged(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", weights={"e1": 3.0})
        name = "model.norm.weight"
        one, two, three = (weights(zoo.full(seed))[name] for seed in (1, 2, 3))
        assert_close(weights(tmp_path / "out")[name], (3 * one + two + three) / 5)

    def test_vocabularies_are_solved_on_the_feature_side(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", side="output")
        merge(zoo, tmp_path / "in", side="input")
        out, feature = weights(tmp_path / "out"), weights(tmp_path / "in")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(out[name], feature[name])
        assert not torch.equal(*(w["model.layers.0.mlp.up_proj.weight"] for w in (out, feature)))

    def test_other_tensors(self, tmp_path: Path) -> None:
        """No architecture is known: buffers, scalars and many axes merge all the same."""
        generator = torch.Generator().manual_seed(0)
        base = {
            "logit_scale": torch.tensor(2.0),
            "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
            "dense.weight": torch.randn(5, 3, generator=generator),
            "double": torch.randn(3, generator=generator, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "position_ids": torch.arange(7),
            "mask": torch.tensor([True, False]),
        }
        expert = {n: w + 1 if w.is_floating_point() else w.clone() for n, w in base.items()}
        expert["position_ids"] += 5
        for name, tensors in {"base": base, "a": expert}.items():
            (tmp_path / name).mkdir()
            save_file(tensors, tmp_path / name / "model.safetensors")
        for method in METHODS:
            out = tmp_path / method
            settings = {"keep": 1.0, "drop": 0.0} if method == "dare_ties" else {}
            settings |= {"keep": 1.0} if method in {"ties", "knots_ties"} else {}
            settings |= {"ridge": 1e-4} if method.endswith("_poe") else {}
            report = merge_checkpoints(
                tmp_path / "base", [tmp_path / "a"], out, method, "cpu", **settings
            )
            merged = weights(out)
            assert rules(report)["position_ids"] == rules(report)["mask"] == "copy"
            for name, weight in base.items():
                assert merged[name].dtype == weight.dtype
                if weight.is_floating_point():
                    assert_close(merged[name], expert[name], 2e-3)
                else:
                    assert torch.equal(merged[name], weight)
            assert {path.name for path in out.iterdir()} == {
                "README.md",
                "lineage.json",
                "merge_report.json",
                "model.safetensors",
            }
            assert any("has no tokenizer" in warning for warning in report.warnings)


class TestMismatches:
    def change(self, zoo: Zoo, tmp_path: Path, **changes: Tensor | None) -> Path:
        folder = copy(zoo.full(1), tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    def test_missing_and_extra_tensors_are_named(self, zoo: Zoo, tmp_path: Path) -> None:
        lacking = "model.layers.1.mlp.up_proj.weight"
        expert = self.change(zoo, tmp_path, **{lacking: None, "value_head.weight": torch.ones(3)})
        experts = {"a": expert, "b": zoo.full(2)}
        report = merge_checkpoints(zoo.base(), experts, tmp_path / "out", "average", "cpu")
        assert any(f"'a' lacks {lacking}; the others decide" in w for w in report.warnings)
        assert any("'a' has value_head.weight" in w for w in report.warnings)
        assert_close(weights(tmp_path / "out")[lacking], weights(zoo.full(2))[lacking])
        (entry,) = (tensor for tensor in report.tensors if tensor.name == lacking)
        assert entry.experts == ("b",)

    def test_a_prefix_of_all_names_is_bridged(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = copy(zoo.full(1), tmp_path / "prefixed")
        stored = load_file(folder / "model.safetensors")
        save_file({f"lm.{n}": t for n, t in stored.items()}, folder / "model.safetensors")
        merge_checkpoints(zoo.base(), [folder], tmp_path / "out", "average", "cpu")
        for name, weight in weights(tmp_path / "out").items():
            assert_close(weight, stored[name])


class TestLineage:
    def test_holds_nothing_of_this_machine(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out")
        for path in (tmp_path / "out").iterdir():
            if path.suffix in {".json", ".md"} and path.name != "tokenizer.json":
                text = path.read_text()
                assert str(tmp_path) not in text
                assert str(zoo.root) not in text
                assert platform.node() not in text
                assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", text)

    def test_hashes_hold(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", "ties", keep=0.4)
        record = Lineage.find(tmp_path / "out")
        assert record.outputs == hash_files(tmp_path / "out")
        assert [source.name for source in record.inputs] == ["base", "e1", "e2", "e3"]
        assert record.inputs[0].files == hash_files(zoo.base())
        assert record.inputs[2].files == hash_files(zoo.full(2))
        assert record.params["settings"]["keep"] == 0.4
        assert record.params["method"] == "ties"
        assert record.packages["torch"] == torch.__version__

    def test_order_of_experts_is_kept(self, zoo: Zoo, tmp_path: Path) -> None:
        report = merge(zoo, tmp_path / "out", "average", 3, 1, 2)
        assert report.experts == ("e3", "e1", "e2")
        assert [s.name for s in Lineage.find(tmp_path / "out").inputs[1:]] == ["e3", "e1", "e2"]

    def test_a_chain_can_be_followed(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "one", "average", 1, 2)
        merge_checkpoints(zoo.base(), [tmp_path / "one", zoo.full(3)], tmp_path / "two", "average")
        parent = Lineage.find(tmp_path / "two").inputs[1].parent
        assert [source["name"] for source in parent["inputs"]] == ["base", "e1", "e2"]

    def test_what_makes_it_out_of_date(self, zoo: Zoo, tmp_path: Path) -> None:
        base, expert = copy(zoo.base(), tmp_path / "base"), copy(zoo.full(1), tmp_path / "a")
        experts = {"a": expert, "b": zoo.full(2)}
        out = tmp_path / "out"
        merge_checkpoints(base, experts, out, "ties", "cpu", keep=0.4)

        def current(**changed: object) -> bool:
            asked = {"base": base, "experts": experts, "method": "ties", "settings": {"keep": 0.4}}
            return merge_lineage(**asked | {"choices": CHOICES} | changed).is_current(out)

        assert current()
        assert current(settings={"keep": 0.4, "strength": 1.0})  # its default
        assert not current(settings={"keep": 0.5})
        assert not current(method="dare_ties", settings={})
        assert not current(choices=CHOICES | {"seed": 1})
        assert not current(experts={"a": expert})
        assert not current(experts=dict(reversed(experts.items())))
        assert not current(experts={"a": expert, "c": zoo.full(2)})
        touch(expert / "model.safetensors")
        assert not current()
        touch(expert / "model.safetensors")
        assert current()
        touch(base / "config.json")
        assert not current()
        touch(base / "config.json")
        touch(out / "model.safetensors")
        assert not current()
        touch(out / "model.safetensors")
        (out / "stray.txt").write_text("x")
        assert not current()
        (out / "stray.txt").unlink()
        assert current()
        (out / "README.md").unlink()
        assert not current()

    def test_produce_works_once(self, tmp_path: Path) -> None:
        done = []

        def work(folder: Path) -> None:
            done.append(folder)
            (folder / "a.txt").write_text("a")

        record = Lineage("fetch", {"x": 1})
        assert produce(tmp_path / "out", record, work)
        assert not produce(tmp_path / "out", record, work)
        assert produce(tmp_path / "out", Lineage("fetch", {"x": 2}), work)
        assert len(done) == 2
        assert {path.name for path in tmp_path.iterdir()} == {"out"}


def touch(path: Path) -> None:
    """Flip the last byte; twice is nothing."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


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


class TestSettings:
    def test_strength_scales_the_update(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "whole")
        merge(zoo, tmp_path / "half", strength=0.5)
        base, whole, half = (weights(p) for p in (zoo.base(), *map(tmp_path.joinpath, HALVES)))
        for name, weight in base.items():
            assert_close(2 * (half[name] - weight), whole[name] - weight, 1e-4)

    def test_weights_are_by_name(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", "task_arithmetic", weights={"e2": 0.0, "e3": 2.0})
        base, one, three = (weights(p) for p in (zoo.base(), zoo.full(1), zoo.full(3)))
        for name, weight in weights(tmp_path / "out").items():
            update = one[name] - base[name] + 2 * (three[name] - base[name])
            assert_close(weight - base[name], update, 1e-4)

    def test_an_expert_of_weight_zero_has_no_say(self, zoo: Zoo, tmp_path: Path) -> None:
        for method, entry in METHODS.items():
            names = {name for name, _, _ in entry.settings.describe()}
            exact = {"rtol": 1e-9} if "rtol" in names else {}  # the loop is left elsewhere else
            merge(zoo, tmp_path / method, method, weights={"e3": 0.0}, **exact)
            merge(zoo, tmp_path / f"{method}-two", method, 1, 2, **exact)
            two = weights(tmp_path / f"{method}-two")
            for name, weight in weights(tmp_path / method).items():
                assert_close(weight, two[name])

    def test_seed_counts_for_dare_alone(self, zoo: Zoo, tmp_path: Path) -> None:
        for method in ("dare_ties", "ties"):
            same = []
            for seed in (0, 1):
                merge(zoo, tmp_path / f"{method}-{seed}", method, seed=seed)
                same.append(weights(tmp_path / f"{method}-{seed}")["lm_head.weight"])
            assert torch.equal(*same) == (method == "ties")


HALVES = ("whole", "half")


def test_sources_are_left_alone(zoo: Zoo, tmp_path: Path) -> None:
    folders = [zoo.base(), zoo.full(1), zoo.adapter(2)]
    before = [{p: (p.read_bytes(), p.stat().st_mtime_ns) for p in f.iterdir()} for f in folders]
    merge_checkpoints(folders[0], folders[1:], tmp_path / "out")
    assert [{p: (p.read_bytes(), p.stat().st_mtime_ns) for p in f.iterdir()} for f in folders] == (
        before
    )


def test_a_merge_is_written_over_only_when_asked(zoo: Zoo, tmp_path: Path) -> None:
    merge(zoo, tmp_path / "out", "average")
    (tmp_path / "out/old.txt").write_text("x")
    merge(zoo, tmp_path / "out", "ties", overwrite=True)
    assert not (tmp_path / "out/old.txt").exists()
    assert Lineage.find(tmp_path / "out").params["method"] == "ties"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_written_files_are_safetensors_of_the_letter(zoo: Zoo, tmp_path: Path) -> None:
    merge(zoo, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    with safe_open(path, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header) % 8 == 0
    spans = [
        entry["data_offsets"]
        for name, entry in json.loads(path.read_bytes()[8 : 8 + header]).items()
        if name != "__metadata__"
    ]
    assert max(end for _, end in spans) + 8 + header == path.stat().st_size


class TestExpertWeights:
    def test_of_the_base(self, zoo: Zoo) -> None:
        stored = load_file(zoo.base() / "model.safetensors")
        given = dict(expert_weights(zoo.base(), None))
        assert list(given) == sorted(stored)
        assert all(torch.equal(weight, stored[name]) for name, weight in given.items())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_of_a_full_expert(self, zoo: Zoo, dtype: str) -> None:
        stored = load_file(zoo.full(1, dtype) / "model.safetensors")
        for name, weight in expert_weights(zoo.base(dtype), zoo.full(1, dtype)):
            assert weight.dtype == stored[name].dtype
            assert_close(weight, stored[name])


class TestPlan:
    def test_peak_grows_with_the_model_and_not_with_its_depth(self, zoo: Zoo) -> None:
        with plan_merge(zoo.base(), {"a": zoo.full(1), "b": zoo.full(2)}, "cauchy_poe", {}) as two:
            peak = two.peak_bytes() - OVERHEAD
            size = sum(info.bytes for info in two.base.tensors.values())
            assert two.read_bytes >= 3 * size
        with plan_merge(zoo.base(), {"a": zoo.full(1)}, "cauchy_poe", {}) as one:
            assert 0 < one.peak_bytes() - OVERHEAD < peak < 40 * size

    def test_factors_need_less(self, zoo: Zoo) -> None:
        full = {"a": zoo.full(1), "b": zoo.full(2)}
        adapters = {"a": zoo.adapter(1), "b": zoo.adapter(2)}
        with plan_merge(zoo.base(), full, "cauchy_poe", {}) as dense:
            with plan_merge(zoo.base(), adapters, "cauchy_poe", {}) as factors:
                assert factors.peak_bytes() < dense.peak_bytes()
            assert dense.rules.keys() == weights(zoo.base()).keys()


def test_names_of_experts_given_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "x/a", tmp_path / "y/a", tmp_path / "b", tmp_path / "z/a"]
    assert list(name_experts(paths)) == ["a", "a-2", "b", "a-3"]
    assert name_experts({"n": tmp_path}) == {"n": tmp_path}


def fail(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
