"""Tiny models with the tensor names and files of those that examples/paper fetches."""

import json
import string
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.zoo import add_noise, save_adapter

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
VOCABULARY = (PAD, END, UNKNOWN, *string.printable[:93])
SIDE = 16  # pixels of an image


def flan_t5(folder: Path) -> Path:
    """An encoder-decoder with gated units and a head of its own, as on the hub."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(VOCABULARY),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    model.lm_head.weight = torch.nn.Parameter(torch.randn(len(VOCABULARY), 32))
    model.save_pretrained(folder)
    as_on_the_hub(folder)
    tokenizer().save_pretrained(folder)
    return folder


def as_on_the_hub(folder: Path) -> None:
    """State what Flan-T5's config states; transformers 5 writes another pair of words for it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["scale_decoder_outputs"]
    path.write_text(json.dumps(config | {"tie_word_embeddings": False}))


def clip(folder: Path, text_width: int = 24) -> Path:
    """Two towers of different width, a tokenizer and an image processor."""
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": text_width,
        "max_position_embeddings": 80,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=20)
    model = CLIPModel(config)
    add_noise(model, 0, 0.3)
    with torch.no_grad():  # colours are seen apart, where they would all look alike
        colours = torch.randn(64, 3, 1, 1).expand(-1, -1, SIDE, SIDE)
        seen = model.vision_model(pixel_values=colours).pooler_output
        model.vision_model.post_layernorm.bias.sub_(seen.mean(dim=0))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def tuned(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    """A full fine-tune: every parameter moved."""
    add_noise(model, seed, 0.02)
    model.save_pretrained(folder)
    if isinstance(model, T5ForConditionalGeneration):
        as_on_the_hub(folder)
    return folder


def lora(model: PreTrainedModel, folder: Path, seed: int, **settings: object) -> Path:
    """A LoRA adapter, with noise in both factors."""
    import peft  # takes seconds

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    add_noise(adapted, seed, 0.2, only="lora_")
    save_adapter(adapted, folder)
    return folder


def vision_tower(folder: Path) -> CLIPVisionModel:
    """The vision tower of a whole CLIP; the text tower is left out with a warning."""
    with warnings.catch_warnings(action="ignore"):
        return CLIPVisionModel.from_pretrained(folder)


def pickled(folder: Path, name: str, **more: torch.Tensor) -> Path:
    """Store the weights of `folder` as a .bin, as older uploads do, with `more` tensors."""
    weights = next(folder.glob("*.safetensors"))
    torch.save(load_file(weights) | more, folder / name)
    weights.unlink()
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and an end to every text."""
    table = Tokenizer(WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    table.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    table.decoder = decoders.Fuse()
    table.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, VOCABULARY.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
