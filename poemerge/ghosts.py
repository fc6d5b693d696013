"""Checkpoints of headers alone, to plan with: sparse files that take no room, whatever their size.

Everything that opens a checkpoint opens these too; whoever reads a tensor of one reads zeros.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from poemerge.atomic import write_json
from poemerge.checkpoint import Checkpoint
from poemerge.layout import ADAPTER, INDEX, SINGLE
from poemerge.rules import is_vocabulary
from poemerge.writer import ShardWriter

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name → shape and dtype

SHARD_BYTES = 5_000_000_000  # at most, as transformers cuts checkpoints
LORA = {"peft_type": "LORA", "bias": "none", "task_type": "CAUSAL_LM", "fan_in_fan_out": False}


def write_ghost(folder: Path, files: Mapping[str, Layout], config: Mapping[str, Any]) -> Path:
    """A checkpoint folder without bytes.

    Args:
        folder: to make.
        files: name of each safetensors file → its tensors.
        config: for config.json.
    """
    folder.mkdir()
    for file, layout in files.items():
        ShardWriter(folder / file, layout).close()
    write_json(folder / "config.json", dict(config))
    if list(files) != [SINGLE]:
        placed = {name: file for file, layout in files.items() for name in layout}
        write_json(folder / INDEX, {"weight_map": placed})
    return folder


def in_shards(layout: Layout, limit: int = SHARD_BYTES) -> dict[str, Layout]:
    """File name → tensors, in the given order, each file of at most `limit` bytes if it can be."""
    shards: list[dict[str, Any]] = [{}]
    room = limit
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = limit
        shards[-1][name] = (shape, dtype)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}


def full_expert(base: Path, folder: Path) -> Path:
    """A full fine-tune of a checkpoint, as far as headers go."""
    with Checkpoint(base) as checkpoint:
        files: dict[str, dict[str, Any]] = {}
        for info in checkpoint.tensors.values():
            files.setdefault(info.file, {})[info.name] = (info.shape, info.dtype)
        return write_ghost(folder, files, checkpoint.config)


def adapter_expert(base: Path, folder: Path, rank: int) -> Path:
    """A LoRA adapter on every matrix but the vocabulary's, its factors in the base's dtype."""
    factors: dict[str, Any] = {}
    targets = []
    with Checkpoint(base) as checkpoint:
        for info in checkpoint.tensors.values():
            if len(info.shape) != 2 or not info.is_float or is_vocabulary(info, checkpoint):
                continue
            layer = info.name.removesuffix(".weight")
            rows, columns = info.shape
            targets.append(layer)
            key = f"base_model.model.{layer}.lora"
            factors[f"{key}_A.weight"] = ((rank, columns), info.dtype)
            factors[f"{key}_B.weight"] = ((rows, rank), info.dtype)
    folder.mkdir()
    ShardWriter(folder / ADAPTER, factors).close()
    config = {**LORA, "r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    write_json(folder / "adapter_config.json", config)
    return folder
