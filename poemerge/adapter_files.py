"""A merged adapter on disk, in PEFT's format: factors as they are, scaling 1."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from poemerge.adapter import CONFIG, PREFIX, WEIGHTS
from poemerge.atomic import write_json
from poemerge.task_vector import LowRank
from poemerge.writer import ShardWriter


def write_adapter(
    folder: Path, updates: Mapping[str, LowRank], dtype: torch.dtype, base_model: str
) -> None:
    """Write `updates` (base tensor name → factors) as `adapter_model.safetensors` and its config.

    The rank may differ from matrix to matrix; `rank_pattern` and an equal `alpha_pattern` say so.
    """
    factors = {}
    for name, update in sorted(updates.items()):
        module = PREFIX + name.removesuffix(".weight")
        factors[f"{module}.lora_A.weight"] = update.down
        factors[f"{module}.lora_B.weight"] = update.up
    layout = {key: (tuple(factor.shape), dtype) for key, factor in factors.items()}
    with ShardWriter(folder / WEIGHTS, layout) as writer:
        for key, factor in factors.items():
            writer.write(key, factor)
    ranks = {name.removesuffix(".weight"): update.rank for name, update in updates.items()}
    write_json(folder / CONFIG, _config(ranks, base_model))


def _config(ranks: Mapping[str, int], base_model: str) -> dict[str, Any]:
    common = max(ranks.values())
    pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
