"""What tests of extraction compare: weights, answers and outcomes by name."""

from pathlib import Path

import peft
import torch
from torch import Tensor

from poemerge.extracting.report import ExtractReport, TensorOutcome
from tests.zoo import load

FULL = 1000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRIX = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(40).reshape(2, 20)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in fp32, the tied head included."""
    state = load(folder).float().state_dict()
    return {name: weight.detach() for name, weight in state.items()}


def by_name(report: ExtractReport) -> dict[str, TensorOutcome]:
    """What was done with each tensor."""
    return {tensor.name: tensor for tensor in report.tensors}


def logits(model: torch.nn.Module) -> Tensor:
    """The answers of a model to fixed tokens."""
    with torch.inference_mode():
        return model.float().eval()(IDS).logits


def unmerged(base: Path, adapter: Path) -> torch.nn.Module:
    """Base and adapter side by side; any complaint of peft's fails the test."""
    return peft.PeftModel.from_pretrained(load(base), adapter)
