"""Tiny real models, made by the libraries whose files poemerge reads."""

import string
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END = "<|end|>"
VOCABULARY = (END, *string.printable[:95])  # 96: no other dimension of the model is equal to it
SHARD = "20KB"


@dataclass(frozen=True)
class Zoo:
    """Makes tiny real models, each once a session; what it returns is for reading only.

    Every model is a Llama of 2 layers, 32 wide, 4 heads (2 of keys and values), 64 inside, with a
    vocabulary of 96 characters and a tokenizer for it.
    """

    root: Path

    def base(self, dtype: str = "float32", *, tied: bool = False, sharded: bool = False) -> Path:
        """A base checkpoint with config, generation config, tokenizer and chat template."""
        folder = self.root / f"base-{dtype}{'-tied' * tied}{'-sharded' * sharded}"
        if not folder.exists():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config(tied=tied)).to(getattr(torch, dtype))
            model.generation_config.max_new_tokens = 8
            save(model, folder, sharded=sharded)
            tokenizer().save_pretrained(folder)
        return folder

    def full(
        self,
        seed: int,
        dtype: str = "float32",
        *,
        tied: bool = False,
        sharded: bool = False,
        noise: float = 0.01,
    ) -> Path:
        """A full fine-tune of that base: every parameter moved by seeded noise."""
        name = f"full-{seed}-{dtype}-{noise}{'-tied' * tied}{'-sharded' * sharded}"
        folder = self.root / name
        if not folder.exists():
            model = load(self.base(dtype, tied=tied))
            add_noise(model, seed, noise)
            save(model, folder, sharded=sharded)
        return folder

    def adapter(
        self, seed: int, dtype: str = "float32", *, tied: bool = False, **lora: object
    ) -> Path:
        """A LoRA adapter on that base, made by peft itself; `lora` as in `adapt`."""
        options = zlib.crc32(repr(sorted(lora.items())).encode())
        folder = self.root / f"adapter-{seed}-{dtype}{'-tied' * tied}-{options:x}"
        if not folder.exists():
            save_adapter(adapt(load(self.base(dtype, tied=tied)), seed, **lora), folder)
        return folder


def config(*, tied: bool = False) -> LlamaConfig:
    """The configuration of every tiny model."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; what has none is the end token."""
    table = Tokenizer(WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=END))
    table.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    table.decoder = decoders.Fuse()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    made = PreTrainedTokenizerFast(tokenizer_object=table, **special)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return made


def save(model: PreTrainedModel, folder: Path, *, sharded: bool = False) -> None:
    """Save as one file, or as shards that hold a few tensors each."""
    model.save_pretrained(folder, max_shard_size=SHARD if sharded else "1GB")


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, in the dtype that its config states."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def adapt(model: PreTrainedModel, seed: int, noise: float = 0.05, **lora: object) -> "PeftModel":  # noqa: F821
    """Put a LoRA adapter on a model, with noise in both factors (r 4, alpha 8, attention)."""
    import peft  # takes seconds, and not every test needs it

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):  # that embeddings are adapted, say
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings | lora))
    add_noise(adapted, seed, noise, only="lora_")
    add_noise(adapted, seed, noise, only="modules_to_save")
    return adapted


def save_adapter(adapted: "PeftModel", folder: Path) -> None:  # noqa: F821
    """Save as peft does, whatever it warns of."""
    with warnings.catch_warnings(action="ignore"):
        adapted.save_pretrained(folder)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Base + adapter, put together by peft, in fp32."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: weight.detach() for name, weight in merged.state_dict().items()}


def add_noise(model: torch.nn.Module, seed: int, noise: float, only: str = "") -> None:
    """Move every parameter with `only` in its name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only in name:
                weight.add_(noise * torch.randn(weight.shape, generator=generator))
