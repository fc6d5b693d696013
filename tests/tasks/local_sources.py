"""A tiny Llama to fetch from this machine, as safetensors and as pickles, and how fetch refuses."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from poemerge.errors import PoemergeError
from tasks.fetch import fetch


def tiny(folder: Path, *, tied: bool = False, shard: str = "50MB") -> LlamaForCausalLM:
    """A real Llama, 2 layers, 32 wide, saved at `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return model


def pickled(folder: Path, *, tied: bool = False) -> LlamaForCausalLM:
    """The same as one pytorch_model.bin."""
    model = tiny(folder, tied=tied)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def assert_loads_as(folder: Path, model: LlamaForCausalLM) -> None:
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def refusal(source: Path | str, tmp_path: Path, **settings: str) -> str:
    """The one sentence that refuses `source`; nothing is left behind."""
    out = tmp_path / "refused"
    with pytest.raises(PoemergeError) as caught:
        fetch.fn("base", str(source), out, **settings)
    assert not list(tmp_path.glob("refused*"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", ").", "'."))
    return str(caught.value)
