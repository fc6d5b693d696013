"""Extraction: the adapter is the best of its rank, loads in peft, and its report is true."""

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from poemerge.errors import CheckpointError, NumericalError, PoemergeError, SettingError
from poemerge.extract import extract_adapter
from poemerge.extracting import rules
from poemerge.extracting.report import ExtractReport, TensorOutcome
from poemerge.extracting.walk import INTEGERS, SAVED_WITH, TIED
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from poemerge.merge import expert_weights, merge_checkpoints
from tests.core.stacks import assert_close
from tests.zoo import VOCABULARY, Zoo, add_noise, config, load, merged_by_peft, save

FULL = 1000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.layers.1.input_layernorm.weight"
MATRIX = "model.layers.1.mlp.up_proj.weight"
KINDS = {
    "plain": {},
    "tied": {"tied": True},
    "sharded": {"sharded": True},
    "bfloat16": {"dtype": "bfloat16"},
}
IDS = torch.arange(40).reshape(2, 20)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in fp32, the tied head included."""
    state = load(folder).float().state_dict()
    return {name: weight.detach() for name, weight in state.items()}


def best(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vh[:rank]).float()


def by_name(report: ExtractReport) -> dict[str, TensorOutcome]:
    return {tensor.name: tensor for tensor in report.tensors}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model.float().eval()(IDS).logits


def unmerged(base: Path, adapter: Path) -> torch.nn.Module:
    """Base and adapter side by side; any complaint of peft's fails the test."""
    return peft.PeftModel.from_pretrained(load(base), adapter)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_adapter_is_base_plus_truncated_update(
    zoo: Zoo, tmp_path: Path, kind: dict[str, object]
) -> None:
    base, expert = zoo.base(**kind), zoo.full(1, **kind)
    report = extract_adapter(base, expert, tmp_path / "a", 5, device="cpu")
    start, tuned = weights(base), weights(expert)
    actual = merged_by_peft(base, tmp_path / "a")
    assert actual.keys() == start.keys()
    for name, weight in actual.items():
        delta = tuned[name] - start[name]
        kept = best(delta, 5) if delta.ndim == 2 else delta
        assert_close(weight, start[name] + kept)
    assert {t.done for t in report.tensors if len(t.shape) == 1} == {"kept whole"}
    assert {t.rank for t in report.factors} == {5}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("vocabulary", ["factors", "keep"])
def test_full_rank_is_the_expert(
    zoo: Zoo, tmp_path: Path, kind: dict[str, object], vocabulary: str
) -> None:
    base, expert, out = zoo.base(**kind), zoo.full(1, **kind), tmp_path / "a"
    report = extract_adapter(base, expert, out, FULL, vocabulary=vocabulary)
    tuned = weights(expert)
    for name, weight in merged_by_peft(base, out).items():
        assert_close(weight, tuned[name])
    for name, weight in expert_weights(base, out):
        assert_close(weight.float(), tuned[name])
    assert report.error == pytest.approx(0, abs=1e-7)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 32
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


def test_unmerged_adapter_answers_as_the_expert(zoo: Zoo, tmp_path: Path) -> None:
    expected = logits(load(zoo.full(1)))
    extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", FULL)
    assert_close(logits(unmerged(zoo.base(), tmp_path / "a")), expected)


def test_a_tied_embedding_kept_whole_stays_tied(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = zoo.base(tied=True), zoo.full(1, tied=True)
    expected = logits(load(expert))
    extract_adapter(base, expert, tmp_path / "a", FULL, vocabulary="keep")
    model = unmerged(base, tmp_path / "a")
    assert_close(logits(model), expected)
    assert_close(logits(model.merge_and_unload()), expected)


def test_a_tied_embedding_in_factors_comes_with_advice(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = zoo.base(tied=True), zoo.full(1, tied=True)
    report = extract_adapter(base, expert, tmp_path / "a", 4)
    assert by_name(report)[EMBEDDING].done == "factors"
    assert any("merge_and_unload" in warning for warning in report.warnings)


def test_a_tied_head_that_is_stored_goes_with_the_embedding(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = (
        Path(shutil.copytree(folder, tmp_path / folder.name))
        for folder in (zoo.base(tied=True), zoo.full(1, tied=True))
    )
    for folder in (base, expert):
        tensors = load_file(folder / "model.safetensors")
        head = {HEAD: tensors[EMBEDDING].clone()}
        save_file(tensors | head, folder / "model.safetensors", {"format": "pt"})
    report = extract_adapter(base, expert, tmp_path / "a", 4)
    assert by_name(report)[HEAD].reason == TIED
    merged = merged_by_peft(base, tmp_path / "a")
    assert torch.equal(merged[HEAD], merged[EMBEDDING])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_errors_are_those_of_the_stored_factors(
    zoo: Zoo, tmp_path: Path, dtype: str, svd: str
) -> None:
    report = extract_adapter(
        zoo.base(), zoo.full(1), tmp_path / "a", 3, svd=svd, dtype=dtype, vectors="drop"
    )
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"}
    start, tuned = weights(zoo.base()), weights(zoo.full(1))
    missed = 0.0
    for tensor in report.tensors:
        delta = (tuned[tensor.name] - start[tensor.name]).double()
        found = torch.zeros_like(delta)
        if tensor.done == "factors":
            key = f"base_model.model.{tensor.name.removesuffix('.weight')}."
            table = tensor.name == EMBEDDING
            keys = ("lora_embedding_A", "lora_embedding_B") if table else None
            down, up = (stored[key + k] for k in keys or ("lora_A.weight", "lora_B.weight"))
            found = up.double() @ down.double()
            found = found.T if table else found
        error = float((delta - found).norm() / delta.norm())
        assert tensor.error == pytest.approx(error, rel=1e-6)
        assert tensor.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert tensor.share == pytest.approx(1 - error**2, rel=1e-6)
        missed += float((delta - found).norm()) ** 2
    whole = math.hypot(*(float((tuned[n] - start[n]).norm()) for n in start))
    assert report.error == pytest.approx(math.sqrt(missed) / whole, rel=1e-6)
    record = json.loads((tmp_path / "a/extract_report.json").read_text())
    assert record["error"] == report.error
    assert [t["name"] for t in record["tensors"]] == sorted(start)
    assert record["worst"] == max(report.factors, key=lambda t: t.error).name


def test_dropped_vectors_are_named_with_what_is_lost(
    zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", 4, vectors="drop")
    dropped = [tensor for tensor in report.tensors if tensor.done == "dropped"]
    assert {len(tensor.shape) for tensor in dropped} == {1}
    assert {tensor.error for tensor in dropped} == {1.0}
    lost = math.hypot(*(tensor.norm for tensor in dropped))
    (warning,) = report.warnings
    assert f"{dropped[0].name} and {len(dropped) - 1} more are dropped" in warning
    assert f"norm {lost:.3g}" in warning
    assert warning in caplog.messages
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert "modules_to_save" not in config
    assert warning in (tmp_path / "a/README.md").read_text()


def test_vocabulary_dropped(zoo: Zoo, tmp_path: Path) -> None:
    report = extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", 4, vocabulary="drop")
    dropped = {t.name: t.reason for t in report.tensors if t.done == "dropped"}
    assert dropped == {HEAD: "vocabulary=drop", EMBEDDING: "vocabulary=drop"}
    merged, start = merged_by_peft(zoo.base(), tmp_path / "a"), weights(zoo.base())
    assert torch.equal(merged[HEAD], start[HEAD])
    assert torch.equal(merged[EMBEDDING], start[EMBEDDING])


def test_what_did_not_move_is_untouched(zoo: Zoo, tmp_path: Path) -> None:
    model = load(zoo.base())
    add_noise(model, 1, 0.01, only="layers.1.mlp.up_proj")
    save(model, tmp_path / "expert")
    report = extract_adapter(zoo.base(), tmp_path / "expert", tmp_path / "a", 4)
    assert {t.name for t in report.tensors if t.done != "untouched"} == {MATRIX}
    assert len(load_file(tmp_path / "a/adapter_model.safetensors")) == 2
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == [MATRIX.removesuffix(".weight")]
    assert report.worst.name == MATRIX


def with_biases(seed: int | None = None) -> PreTrainedModel:
    """A Llama whose attention has biases; fine-tuned where a seed is given."""
    torch.manual_seed(0)
    settings = config()
    settings.attention_bias = True
    model = LlamaForCausalLM(settings)
    if seed is not None:
        add_noise(model, seed, 0.01)
    return model


def test_a_bias_beside_factors_is_dropped(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    save(with_biases(), base)
    save(with_biases(1), expert)
    report = extract_adapter(base, expert, tmp_path / "a", FULL)
    dropped = [tensor for tensor in report.tensors if tensor.done == "dropped"]
    assert dropped
    assert all(t.name.endswith("_proj.bias") and t.reason == rules.BIAS for t in dropped)
    assert "only the full checkpoint has them" in report.warnings[0]
    start, tuned = weights(base), weights(expert)
    for name, weight in merged_by_peft(base, tmp_path / "a").items():
        assert_close(weight, (start if name.endswith(".bias") else tuned)[name])


def test_a_bias_whose_weight_stays_is_kept_with_its_layer(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    save(with_biases(), base)
    model = with_biases()
    add_noise(model, 1, 0.01, only="q_proj.bias")
    add_noise(model, 1, 0.01, only="up_proj")
    save(model, expert)
    report = extract_adapter(base, expert, tmp_path / "a", FULL)
    outcome = by_name(report)["model.layers.0.self_attn.q_proj.weight"]
    assert (outcome.done, outcome.reason) == ("untouched", SAVED_WITH)
    tuned = weights(expert)
    for name, weight in merged_by_peft(base, tmp_path / "a").items():
        assert_close(weight, tuned[name])
    assert_close(logits(unmerged(base, tmp_path / "a")), logits(model))


def gpt2(seed: int | None = None, only: str = "") -> PreTrainedModel:
    """Layers stored (in, out), biases everywhere, a tied head, a table of positions."""
    torch.manual_seed(0)
    settings = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=len(VOCABULARY)
    )
    model = GPT2LMHeadModel(settings)
    if seed is not None:
        add_noise(model, seed, 0.01, only)
    return model


@pytest.mark.parametrize("vocabulary", ["factors", "keep"])
def test_transposed_layers(tmp_path: Path, vocabulary: str) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    save(gpt2(), base)
    save(gpt2(1), expert)
    report = extract_adapter(base, expert, tmp_path / "a", FULL, vocabulary=vocabulary)
    outcomes = by_name(report)
    assert outcomes["transformer.wpe.weight"].done == "kept whole"
    assert outcomes["transformer.h.0.attn.c_attn.weight"].done == "factors"
    assert outcomes["transformer.h.0.attn.c_attn.bias"].reason == rules.BIAS
    start, tuned = weights(base), weights(expert)
    lost = {t.name for t in report.tensors if t.done == "dropped"}
    for name, weight in merged_by_peft(base, tmp_path / "a").items():
        assert_close(weight, (start if name in lost else tuned)[name])
    for name, weight in expert_weights(base, tmp_path / "a"):
        assert_close(weight, (start if name in lost else tuned)[name])


def test_a_module_is_kept_with_all_its_tensors(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    save(gpt2(), base)
    model = gpt2(1, only="ln_1.bias")
    add_noise(model, 2, 0.01, only="c_fc.weight")
    save(model, expert)
    report = extract_adapter(base, expert, tmp_path / "a", FULL)
    assert by_name(report)["transformer.h.1.ln_1.weight"].reason == SAVED_WITH
    assert_close(logits(unmerged(base, tmp_path / "a")), logits(model))


def test_parameters_of_no_module_of_their_own_are_dropped(tmp_path: Path) -> None:
    """PEFT keeps whole modules: not a model's own parameter, nor one beside further modules."""
    torch.manual_seed(0)
    shapes = {"scale": (3,), "patches.token": (1, 1, 4), "patches.proj.weight": (4, 6)}
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    steps = {name: torch.tensor([7]) for name in ("steps.count", "steps.other")}
    for folder, move in ((tmp_path / "base", 0.0), (tmp_path / "expert", 0.1)):
        folder.mkdir()
        moved = {name: weight + move for name, weight in start.items()}
        save_file(moved | steps, folder / "model.safetensors")
    report = extract_adapter(tmp_path / "base", tmp_path / "expert", tmp_path / "a", 2)
    done = {tensor.name: (tensor.done, tensor.reason) for tensor in report.tensors}
    assert done["scale"] == ("dropped", rules.ROOTLESS)
    assert done["patches.token"] == ("dropped", rules.NESTED)
    assert done["patches.proj.weight"] == ("factors", "")
    assert done["steps.count"] == ("untouched", INTEGERS)
    assert len(report.warnings) == 2


def test_the_adapter_is_an_expert(zoo: Zoo, tmp_path: Path) -> None:
    for seed in (1, 2):
        extract_adapter(zoo.base(), zoo.full(seed), tmp_path / f"a{seed}", FULL)
    adapters = [tmp_path / "a1", tmp_path / "a2"]
    merge_checkpoints(zoo.base(), adapters, tmp_path / "m", "average", "cpu")
    merge_checkpoints(zoo.base(), [zoo.full(1), zoo.full(2)], tmp_path / "f", "average", "cpu")
    merged, expected = weights(tmp_path / "m"), weights(tmp_path / "f")
    for name, weight in merged.items():
        assert_close(weight, expected[name])


def test_adapters_without_vectors_merge_in_factors(zoo: Zoo, tmp_path: Path) -> None:
    for seed in (1, 2):
        extract_adapter(zoo.base(), zoo.full(seed), tmp_path / f"a{seed}", 4, vectors="drop")
    adapters = [tmp_path / "a1", tmp_path / "a2"]
    merge_checkpoints(zoo.base(), adapters, tmp_path / "m", "cauchy_poe", "cpu", output="adapter")
    assert (tmp_path / "m/adapter_model.safetensors").exists()


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_same_bytes_again(zoo: Zoo, tmp_path: Path, svd: str) -> None:
    for name in ("once", "again"):
        extract_adapter(zoo.base(), zoo.full(1), tmp_path / name, 4, svd=svd, device="cpu")
    files = [path.name for path in (tmp_path / "once").iterdir()]
    assert {"README.md", "lineage.json", "extract_report.json"} <= set(files)
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_lineage_says_what_made_it(zoo: Zoo, tmp_path: Path) -> None:
    extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", 4, vectors="drop")
    record = Lineage.find(tmp_path / "a")
    assert record is not None
    assert record.stage == "extract"
    assert record.params["rank"] == 4
    assert record.params["vectors"] == "drop"
    assert [source.name for source in record.inputs] == ["base", "expert"]
    assert record.inputs[1].files == hash_files(zoo.full(1))
    assert record.outputs == hash_files(tmp_path / "a")
    assert record.is_current(tmp_path / "a")
    card = (tmp_path / "a/README.md").read_text()
    assert f'base_model: "{zoo.base().name}"' in card
    assert str(tmp_path) not in card + (tmp_path / "a/lineage.json").read_text()


def test_progress_and_overwrite(zoo: Zoo, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").write_text("")
    extract_adapter(
        zoo.base(), zoo.full(1), tmp_path / "a", 1,
        overwrite=True, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (len(seen), len(seen))
    assert not (tmp_path / "a/old").exists()


def test_an_expert_that_lacks_tensors_or_has_more(zoo: Zoo, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(zoo.full(1), tmp_path / "expert"))
    tensors = load_file(expert / "model.safetensors")
    del tensors[NORM]
    save_file(tensors | {"extra.weight": torch.ones(3)}, expert / "model.safetensors")
    report = extract_adapter(zoo.base(), expert, tmp_path / "a", 4)
    assert by_name(report)[NORM].reason == "not in the expert"
    assert any(NORM in w for w in report.warnings)
    assert any("extra.weight" in w for w in report.warnings)


def test_a_head_of_its_own_is_missed(zoo: Zoo, tmp_path: Path) -> None:
    report = extract_adapter(zoo.base(tied=True), zoo.full(1), tmp_path / "a", 4)
    assert any("output head of its own" in warning for warning in report.warnings)


class TestRefused:
    def check(
        self, zoo: Zoo, root: Path, error: type[PoemergeError], pattern: str, **changed: object
    ) -> None:
        before = set(root.iterdir())
        given = {"base": zoo.base(), "expert": zoo.full(1), "out": root / "out", "rank": 4}
        with pytest.raises(error, match=pattern) as caught:
            extract_adapter(**given | changed)
        assert set(root.iterdir()) == before
        sentence = str(caught.value)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert ";" in sentence, "what to do?"

    @pytest.mark.parametrize(
        ("changed", "pattern"),
        [
            ({"rank": 0}, "rank is 0; choose 1 or more"),
            ({"rank": -3}, "rank is -3"),
            ({"svd": "fast"}, "svd is 'fast'; choose auto"),
            ({"vectors": "factors"}, "vectors is 'factors'; choose keep, drop"),
            ({"vocabulary": "all"}, "vocabulary is 'all'; choose factors"),
            ({"dtype": "source"}, "dtype is 'source'; choose float32"),
            ({"device": "tpu"}, "device is 'tpu'; choose"),
        ],
    )
    def test_settings(
        self, zoo: Zoo, tmp_path: Path, changed: dict[str, object], pattern: str
    ) -> None:
        self.check(zoo, tmp_path, SettingError, pattern, **changed)

    def test_an_adapter(self, zoo: Zoo, tmp_path: Path) -> None:
        expert = zoo.adapter(1)
        self.check(zoo, tmp_path, SettingError, "is a PEFT adapter already; use", expert=expert)

    def test_the_base_itself(self, zoo: Zoo, tmp_path: Path) -> None:
        pattern = "equals the base; give the fine-tuned"
        self.check(zoo, tmp_path, CheckpointError, pattern, expert=zoo.base())

    def test_places(self, zoo: Zoo, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        there = tmp_path / "there"
        self.check(zoo, tmp_path, SettingError, "exists already; .*--overwrite", out=there)
        inside = zoo.base() / "a"
        self.check(zoo, tmp_path, SettingError, "lies in the source", out=inside, overwrite=True)

    def test_nothing_for_factors(self, zoo: Zoo, tmp_path: Path) -> None:
        model = load(zoo.base())
        add_noise(model, 1, 0.01, only="norm")
        save(model, tmp_path / "expert")
        expert = tmp_path / "expert"
        self.check(zoo, tmp_path, CheckpointError, "changes no matrix .*layernorm", expert=expert)

    @pytest.mark.parametrize("role", ["base", "expert"])
    def test_nan(self, zoo: Zoo, tmp_path: Path, role: str) -> None:
        source = zoo.base() if role == "base" else zoo.full(1)
        folder = Path(shutil.copytree(source, tmp_path / "nan"))
        tensors = load_file(folder / "model.safetensors")
        tensors[MATRIX][0, 0] = math.nan
        save_file(tensors, folder / "model.safetensors")
        pattern = f"{MATRIX} of .*{role}.* holds NaN" if role == "base" else f"{MATRIX} of expert"
        self.check(zoo, tmp_path, CheckpointError, pattern, **{role: folder})

    def test_what_does_not_fit_into_half_precision(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(zoo.full(1), tmp_path / "large"))
        tensors = load_file(folder / "model.safetensors")
        tensors[MATRIX] *= 1e12
        save_file(tensors, folder / "model.safetensors")
        pattern = f"{MATRIX} does not fit into torch.float16; choose another"
        self.check(zoo, tmp_path, NumericalError, pattern, expert=folder, dtype="float16")
