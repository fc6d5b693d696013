"""Checkpoints of unusual numbers: many experts, many tensors, more bytes than the disk has."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from poemerge.layout import ADAPTER, INDEX, SINGLE
from poemerge.writer import ShardWriter

Shapes = Mapping[str, tuple[int, ...]]
RANK, ALPHA = 2, 4
MATRICES = ("layers.0.q_proj.weight", "layers.0.down_proj.weight")
TINY: Shapes = {
    "embed_tokens.weight": (40, 12),
    "layers.0.q_proj.weight": (12, 12),
    "layers.0.down_proj.weight": (12, 20),
    "layers.0.norm.weight": (12,),
}
HUGE: Shapes = {
    "embed_tokens.weight": (128256, 4096),
    **{f"layers.{i}.{x}_proj.weight": (4096, 4096) for i in range(42) for x in "qkvo"},
    **{f"layers.{i}.{x}_proj.weight": (14336, 4096) for i in range(42) for x in ("gate", "up")},
    **{f"layers.{i}.down_proj.weight": (4096, 14336) for i in range(42)},
    **{f"layers.{i}.norm.weight": (4096,) for i in range(42)},
}  # 21.5 GB in 16 bits


def normal(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fine_tuned(base: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    noise = normal({name: tuple(weight.shape) for name, weight in base.items()}, seed)
    return {name: weight + 0.1 * noise[name] for name, weight in base.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint in one file or more."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(dict(tensors), folder / SINGLE, metadata={"format": "pt"})
        return folder
    placed = _placed(list(tensors), shards)
    for file in sorted(set(placed.values())):
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


def full_experts(root: Path, size: int) -> tuple[Path, list[Path]]:
    """A base and that many fine-tunes of it, each in two shards."""
    base = normal(TINY, 0)
    moved = (fine_tuned(base, seed) for seed in range(1, size + 1))
    folders = [write(root / f"full{i:03}", tensors, shards=2) for i, tensors in enumerate(moved)]
    return write(root / "base", base), folders


def adapters(root: Path, size: int) -> list[Path]:
    """That many LoRA adapters of that base, on both matrices."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    folders = []
    for seed in range(size):
        folders.append(root / f"lora{seed:03}")
        folders[-1].mkdir()
        save_file(normal(_factors(), 1000 + seed), folders[-1] / ADAPTER)
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config))
    return folders


def _factors() -> Shapes:
    found: dict[str, tuple[int, ...]] = {}
    for name in MATRICES:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        rows, columns = TINY[name]
        found |= {f"{module}.lora_A.weight": (RANK, columns)}
        found |= {f"{module}.lora_B.weight": (rows, RANK)}
    return found


def mixture(size: int) -> Shapes:
    """Names as in a mixture of 128 experts a layer, three matrices each."""

    def names() -> Iterator[tuple[str, tuple[int, int]]]:
        for index in count():
            layer, place = divmod(index, 384)
            expert, kind = divmod(place, 3)
            module = ("gate_proj", "up_proj", "down_proj")[kind]
            shape = (16, 8) if kind == 2 else (8, 16)
            yield f"model.layers.{layer}.mlp.experts.{expert}.{module}.weight", shape

    return dict(islice(names(), size))


def unrelated(size: int) -> Shapes:
    """Names that have nothing in common, not even their first part."""
    return {f"tensor{index}.weight": (8, 16) for index in range(size)}


def sparse(folder: Path, shapes: Shapes, shards: int = 1) -> Path:
    """A checkpoint that is all header: its weights are a hole in the file."""
    folder.mkdir(parents=True)
    placed = _placed(list(shapes), shards)
    for file in sorted(set(placed.values())):
        layout = {n: (s, torch.bfloat16) for n, s in shapes.items() if placed[n] == file}
        with ShardWriter(folder / file, layout):
            pass
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


def _placed(names: Sequence[str], shards: int) -> dict[str, str]:
    """Name → file, in turn."""
    if shards == 1:
        return dict.fromkeys(names, SINGLE)
    return {name: f"model-{index % shards:05}.safetensors" for index, name in enumerate(names)}
