"""The two kinds of expert: how a model is made ready to train, and how it is stored."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from poemerge.layout import RECORD

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """How experts of one kind are trained; one recipe serves all tasks."""

    steps: int
    peak_rate: float  # learning rate after the warm-up, then a line down to 0
    rank: int | None = None  # of a LoRA adapter; None: all weights are trained
    alpha: int | None = None
    batch: int = 16  # items a step
    warmup: int = 10  # steps

    def rate(self, step: int) -> float:
        """A line up over the warm-up, then a line down to nothing after the last step."""
        return self.peak_rate * min((step + 1) / self.warmup, (self.steps - step) / self.steps)


KINDS = {
    "lora": Recipe(steps=80, peak_rate=1e-3, rank=4, alpha=8),
    "full": Recipe(steps=80, peak_rate=1e-4),
}


def prepare(base: Path, recipe: Recipe, seed: int) -> torch.nn.Module:
    """The base in fp32, with a LoRA adapter on every linear layer if the recipe has a rank."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if recipe.rank is not None:
        lora = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=LINEAR,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model.train()


def store(model: torch.nn.Module, base: Path, folder: Path) -> None:
    """Write an adapter as a PEFT folder in fp16, or a full fine-tune as the base's twin in bf16."""
    if isinstance(model, PreTrainedModel):
        _store_checkpoint(model, base, folder)
    else:
        _store_adapter(model, folder)


def _store_checkpoint(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Weights in bf16, with the base's tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    written = {path.name for path in folder.iterdir()} | {RECORD}
    for path in sorted(base.iterdir()):
        if path.name not in written and ".safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)


def _store_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Factors in fp16, and a config that names the base by its public name."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT looks the base up
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    halves = {key: value.half() for key, value in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    _sort_modules(folder / "adapter_config.json")


def _sort_modules(path: Path) -> None:
    """PEFT writes the module names as a set, in a new order each time."""
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")
