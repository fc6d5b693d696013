"""A base model and four full fine-tunes of it, made up: for timing, not for reading.

python -m benchmarks.models FOLDER
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXPERTS = 4
NOISE = 1e-3  # standard deviation of what fine-tuning changed
END = "<end>"
CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}  # 127 M parameters


def make_models(folder: Path, **config: int) -> tuple[Path, list[Path]]:
    """Make what is missing in a folder: `base`, and `expert0` and on; bf16, safetensors.

    Args:
        folder: where to put them.
        config: what is other than in `CONFIG`; takes effect on a new base only.
    """
    base = folder / "base"
    _once(base, lambda: LlamaForCausalLM(LlamaConfig(**{**CONFIG, **config})), seed=0)
    experts = [folder / f"expert{index}" for index in range(EXPERTS)]
    for seed, expert in enumerate(experts, start=1):
        _once(expert, lambda: _moved(base), seed=seed)
    return base, experts


def _once(folder: Path, build: Callable[[], LlamaForCausalLM], seed: int) -> None:
    """Build and save a model, unless it is there; under another name until it is complete."""
    if folder.exists():
        return
    torch.manual_seed(seed)
    model = build().to(torch.bfloat16)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    _tokenizer(model.config.vocab_size).save_pretrained(partial)
    partial.rename(folder)


def _moved(base: Path) -> LlamaForCausalLM:
    """The base with every parameter moved by noise."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    state: Mapping[str, Tensor] = model.state_dict()
    for weight in state.values():
        weight.add_(NOISE * torch.randn_like(weight))
    return model


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One made-up word for each row of the vocabulary."""
    words = {END: 0, **{f"word{index}": index for index in range(1, size)}}
    table = Tokenizer(WordLevel(words, unk_token=END))
    table.pre_tokenizer = Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=table, **special)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    made, fine_tuned = make_models(parser.parse_args().folder)
    print(made, *fine_tuned, sep="\n")
