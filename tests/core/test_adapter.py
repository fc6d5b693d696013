"""LoRA adapters against peft: the update that they are, and the merged adapter written back."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from poemerge.errors import CheckpointError, SettingError
from poemerge.lora_config import Patterns
from poemerge.merge import expert_weights, merge_checkpoints
from tests.core.stacks import assert_close
from tests.zoo import VOCABULARY, Zoo, adapt, load, merged_by_peft, save, save_adapter

PATTERNS = {"q_proj": 7, r"layers\.1\.self_attn\.k_proj": 2, "model.layers.0.self_attn.o_proj": 1}
OPTIONS = {
    "alpha / r": {"r": 4, "lora_alpha": 8},
    "odd": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "rank_pattern": {"rank_pattern": PATTERNS},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 32, r"0\.self_attn\.q_proj": 1}},
    "both, rslora": {
        "rank_pattern": PATTERNS,
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
    "all linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}
STORE_ADAPTER = {"method": "cauchy_poe", "output": "adapter", "device": "cpu"}


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual
    for name, weight in actual.items():
        assert_close(weight, expected[name])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scaling_is_that_of_peft(zoo: Zoo, options: dict[str, object]) -> None:
    adapter = zoo.adapter(1, **options)
    actual = dict(expert_weights(zoo.base(), adapter))
    expected = merged_by_peft(zoo.base(), adapter)
    assert actual.keys() == expected.keys()
    assert_same_weights(actual, expected)
    base = load_file(zoo.base() / "model.safetensors")
    moved = {name for name, weight in actual.items() if not torch.equal(weight, base[name])}
    assert any("q_proj" in name for name in moved)


def test_patterns_count_as_in_peft() -> None:
    """Escaped names are looked up, others tried one by one: whichever comes first counts."""
    from peft.utils.other import get_pattern_key

    keys = [r"layers\.1\.q_proj", "q_proj", r".*\.k.*", r"a\.layers\.2\.k_proj", "up", "o_pro."]
    modules = [f"{a}layers.{i}.{m}_proj" for a in ("", "a.") for i in (1, 2) for m in "qkov"]
    for order in (keys, keys[::-1], keys[3:] + keys[:3]):
        patterns = Patterns({key: place for place, key in enumerate(order)})
        for module in (*modules, "mlp.up", "mlp.cup"):
            found = get_pattern_key(order, module)
            expected = order.index(found) if found in order else None
            assert patterns.find(module, None) == expected


def test_a_pattern_for_each_of_many_modules_is_found_at_once() -> None:
    """As an adapter has them that was merged from others of several ranks."""
    modules = [f"layers.{index}.q_proj" for index in range(5000)]
    start = time.process_time()
    patterns = Patterns({re.escape(module): place for place, module in enumerate(modules)})
    assert [patterns.find(module, None) for module in modules] == list(range(5000))
    assert time.process_time() - start < 2


def test_a_tied_embedding_moves_once(zoo: Zoo) -> None:
    adapter = zoo.adapter(1, tied=True, target_modules=["embed_tokens", "q_proj"])
    base = zoo.base(tied=True)
    assert_same_weights(dict(expert_weights(base, adapter)), merged_by_peft(base, adapter))


def test_an_adapter_of_bf16_weights(zoo: Zoo) -> None:
    base, adapter = zoo.base("bfloat16"), zoo.adapter(1, "bfloat16")
    actual = dict(expert_weights(base, adapter))
    assert {weight.dtype for weight in actual.values()} == {torch.bfloat16}
    assert_same_weights(actual, merged_by_peft(base, adapter))


def mixed(zoo: Zoo) -> dict[str, Path]:
    return {
        "a": zoo.adapter(1, r=4, lora_alpha=8),
        "b": zoo.adapter(2, rank_pattern=PATTERNS, use_rslora=True),
        "c": zoo.adapter(3, target_modules=["q_proj", "gate_proj", "embed_tokens"], r=2),
    }


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "gaussian_poe", "cauchy_poe"])
def test_merged_adapter_is_the_full_merge(zoo: Zoo, tmp_path: Path, method: str) -> None:
    experts = mixed(zoo)
    settings = {"strength": 0.7, "weights": {"b": 0.5}}
    base = zoo.base()
    merge_checkpoints(base, experts, tmp_path / "full", method, "cpu", **settings)
    merge_checkpoints(
        base, experts, tmp_path / "adapter", method, "cpu", output="adapter", **settings
    )
    full = load_file(tmp_path / "full/model.safetensors")
    assert_same_weights(full, merged_by_peft(base, tmp_path / "adapter"))


def test_merged_adapter_has_no_more_ranks_than_its_parts(zoo: Zoo, tmp_path: Path) -> None:
    experts = mixed(zoo)
    merge_checkpoints(zoo.base(), experts, tmp_path / "out", **STORE_ADAPTER)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    ranks: dict[str, int] = {}
    for folder in experts.values():
        for key, factor in load_file(folder / "adapter_model.safetensors").items():
            if key.endswith(("lora_A.weight", "lora_embedding_A")):
                ranks[key] = ranks.get(key, 0) + factor.shape[0]
    assert ranks.keys() <= stored.keys()
    for key, rank in ranks.items():
        assert stored[key].shape[0] <= min(rank, *stored[key].shape[1:])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["base_model_name_or_path"] == zoo.base().name
    assert "/" not in config["base_model_name_or_path"]


def test_merged_adapter_is_an_expert_again(zoo: Zoo, tmp_path: Path) -> None:
    """What poemerge writes, poemerge reads: merging a merge alone is that merge."""
    merge_checkpoints(zoo.base(), mixed(zoo), tmp_path / "once", **STORE_ADAPTER)
    merge_checkpoints(zoo.base(), [tmp_path / "once"], tmp_path / "twice", "average", "cpu")
    merge_checkpoints(zoo.base(), mixed(zoo), tmp_path / "full", "cauchy_poe", "cpu")
    twice, full = (load_file(tmp_path / n / "model.safetensors") for n in ("twice", "full"))
    assert_same_weights(twice, full)


def test_adapter_output_in_half_precision(zoo: Zoo, tmp_path: Path) -> None:
    merge_checkpoints(zoo.base(), mixed(zoo), tmp_path / "a", **STORE_ADAPTER, dtype="bfloat16")
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {factor.dtype for factor in stored.values()} == {torch.bfloat16}


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=len(VOCABULARY))
    return GPT2LMHeadModel(config)


def test_transposed_layers(tmp_path: Path) -> None:
    """GPT-2 stores its layers (in, out), which LoRA calls fan_in_fan_out."""
    base, adapters = tmp_path / "base", [tmp_path / "1", tmp_path / "2"]
    save(gpt2(), base)
    for seed, folder in enumerate(adapters):
        save_adapter(adapt(gpt2(), seed, target_modules=["c_attn"], fan_in_fan_out=True), folder)
    assert_same_weights(dict(expert_weights(base, adapters[0])), merged_by_peft(base, adapters[0]))
    merge_checkpoints(base, adapters, tmp_path / "full", "gaussian_poe", "cpu")
    merge_checkpoints(base, adapters, tmp_path / "a", "gaussian_poe", "cpu", output="adapter")
    full = load_file(tmp_path / "full/model.safetensors")
    assert_same_weights(full, merged_by_peft(base, tmp_path / "a"))


class TestRefused:
    def check(self, zoo: Zoo, adapter: Path, pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern) as caught:
            dict(expert_weights(zoo.base(), adapter))
        assert str(adapter) in str(caught.value)

    def test_dora(self, zoo: Zoo) -> None:
        self.check(zoo, zoo.adapter(1, use_dora=True), "use_dora=True.*merge it into its base")

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_bias(self, zoo: Zoo, bias: str) -> None:
        self.check(zoo, zoo.adapter(1, bias=bias), f"bias='{bias}'.*merge it into its base")

    def test_lora_bias(self, zoo: Zoo) -> None:
        self.check(zoo, zoo.adapter(1, lora_bias=True), "lora_bias=True")

    def test_hidden_dora(self, zoo: Zoo, tmp_path: Path) -> None:
        """The config is silent, the tensors are not."""
        folder = copy(zoo.adapter(1, use_dora=True), tmp_path, use_dora=False)
        self.check(zoo, folder, "lora_magnitude_vector.* is no plain LoRA factor")

    def test_other_kinds(self, zoo: Zoo, tmp_path: Path) -> None:
        self.check(zoo, copy(zoo.adapter(1), tmp_path, peft_type="IA3"), "type IA3; only LORA")

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
    def test_changed_base(self, zoo: Zoo, tmp_path: Path, init: str) -> None:
        folder = copy(zoo.adapter(1), tmp_path, init_lora_weights=init)
        self.check(zoo, folder, "changes the base weights; convert")

    def test_another_embedding(self, zoo: Zoo, tmp_path: Path) -> None:
        """peft stores the embedding that it adapts: another one than the base's is a change."""
        adapter = zoo.adapter(1, target_modules=["embed_tokens"])
        model = load(zoo.base())
        with torch.no_grad():
            model.get_input_embeddings().weight[0, 0] += 1
        save(model, tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"base_layer\.weight.* differs from the base's"):
            dict(expert_weights(tmp_path / "other", adapter))

    def test_wrong_rank(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = copy(zoo.adapter(1), tmp_path, r=5)
        self.check(zoo, folder, "has factors .* says rank 5; save the adapter again")

    def test_another_base(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = copy(zoo.adapter(1), tmp_path)
        stored = load_file(folder / "adapter_model.safetensors")
        key = next(key for key in stored if key.endswith("k_proj.lora_B.weight"))
        stored[key] = torch.zeros(48, 4)
        save_file(stored, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \(48, 32\)"):
            dict(expert_weights(zoo.base(), folder))

    def test_half_a_pair(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = copy(zoo.adapter(1), tmp_path)
        stored = load_file(folder / "adapter_model.safetensors")
        del stored[next(key for key in stored if "lora_B" in key)]
        save_file(stored, folder / "adapter_model.safetensors")
        self.check(zoo, folder, "has no .*lora_B.weight; save it again")

    def test_no_weights(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = copy(zoo.adapter(1), tmp_path)
        (folder / "adapter_model.safetensors").unlink()
        self.check(zoo, folder, "adapter_model.safetensors is missing; save the adapter again")

    def test_adapter_output_of_dense_updates(self, zoo: Zoo, tmp_path: Path) -> None:
        whole = zoo.adapter(1, **OPTIONS["modules to save"])
        for expert in (zoo.full(1), whole):
            with pytest.raises(SettingError, match="dense update, which no adapter holds"):
                merge_checkpoints(
                    zoo.base(), [expert, zoo.adapter(2)], tmp_path / "out", **STORE_ADAPTER
                )
        with pytest.raises(SettingError, match="ties makes dense updates"):
            merge_checkpoints(
                zoo.base(), mixed(zoo), tmp_path / "out", "ties", "cpu", output="adapter"
            )
        assert list(tmp_path.iterdir()) == []


def copy(adapter: Path, tmp_path: Path, **changed: object) -> Path:
    """A copy of an adapter whose config says something else."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    return folder
