"""A merged adapter on disk, in PEFT's format: factors as they are, scaling 1."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from poemerge.adapter import CONFIG, PREFIX, WEIGHTS, Adapter
from poemerge.atomic import write_json
from poemerge.task_vector import LowRank
from poemerge.writer import ShardWriter


def write_adapter(
    folder: Path,
    updates: Mapping[str, LowRank],
    like: Sequence[Adapter],
    dtype: torch.dtype,
    base_model: str,
) -> None:
    """Write `updates` (base tensor name → factors) as `adapter_model.safetensors` and its config.

    The rank may differ from matrix to matrix; `rank_pattern` and an equal `alpha_pattern` say so.
    Embeddings and transposed layers are laid out as in the adapters that were merged, `like`.
    """
    embeddings = {name for adapter in like for name in adapter.factors if adapter.embeds(name)}
    transposed = any(adapter.lora.fan_in_fan_out for adapter in like)
    factors = {}
    for name, update in sorted(updates.items()):
        module = PREFIX + name.removesuffix(".weight")
        turned = transposed or name in embeddings
        down, up = (update.up.mT, update.down.mT) if turned else (update.down, update.up)
        pattern = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
        factors[f"{module}.{pattern.format('A')}"] = down
        factors[f"{module}.{pattern.format('B')}"] = up
    layout = {key: (tuple(factor.shape), dtype) for key, factor in factors.items()}
    with ShardWriter(folder / WEIGHTS, layout) as writer:
        for key, factor in factors.items():
            writer.write(key, factor)
    ranks = {name.removesuffix(".weight"): update.rank for name, update in updates.items()}
    write_json(folder / CONFIG, _config(ranks, base_model) | {"fan_in_fan_out": transposed})


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
        "inference_mode": True,
    }
