"""Extraction of layers with biases, of transposed ones, and of what has no module of its own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from poemerge.extract import extract_adapter
from poemerge.extracting import rules
from poemerge.extracting.walk import INTEGERS, SAVED_WITH
from poemerge.merge import expert_weights
from tests.core.extracted import FULL, by_name, logits, unmerged, weights
from tests.core.stacks import assert_close
from tests.zoo import VOCABULARY, add_noise, config, merged_by_peft, save


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
