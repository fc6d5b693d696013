"""An adapter on disk, in PEFT's format: factors as they are, scaling 1, and modules kept whole."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.adapter import CONFIG, PREFIX, Adapter
from poemerge.atomic import write_json
from poemerge.layout import ADAPTER
from poemerge.update import LowRank
from poemerge.writer import ShardWriter


@dataclass(frozen=True)
class Whole:
    """A tensor that replaces the base's; read only when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_adapter(
    folder: Path,
    updates: Mapping[str, LowRank],
    like: Sequence[Adapter],
    dtype: torch.dtype,
    base_model: str,
    *,
    embeddings: Collection[str] = (),
    transposed: bool = False,
    whole: Mapping[str, Whole] | None = None,
    tied: bool = False,
    task: str | None = None,
) -> None:
    """Write `updates` (base tensor name → factors) as `adapter_model.safetensors` and its config.

    The rank may differ from matrix to matrix; `rank_pattern` and an equal `alpha_pattern` say so.
    Embeddings and transposed layers are laid out as in the adapters that were merged, `like`.

    Args:
        folder: where to.
        updates: base tensor name → factors, one at least.
        like: adapters whose layout is taken over.
        dtype: of the factors.
        base_model: what the config names as the base.
        embeddings: names among `updates` that are embeddings, whatever `like` says.
        transposed: True if layers hold their weights (in, out), as those of GPT-2 do.
        whole: base tensor name → replacement (PEFT's `modules_to_save`). PEFT wants every tensor
            of such a module.
        tied: True if `whole` holds both ends of a tied pair, which PEFT then keeps tied.
        task: PEFT's name for what the model is (`CAUSAL_LM`, ...); None for a plain one.
    """
    whole = whole or {}
    embeddings = {name for a in like for name in a.factors if a.embeds(name)}.union(embeddings)
    transposed = transposed or any(adapter.lora.fan_in_fan_out for adapter in like)
    factors = _named_factors(updates, embeddings, transposed=transposed)
    layout = {key: (tuple(factor.shape), dtype) for key, factor in factors.items()}
    layout |= {PREFIX + name: (kept.shape, kept.dtype) for name, kept in whole.items()}
    with ShardWriter(folder / ADAPTER, layout) as writer:
        for key, factor in factors.items():
            writer.write(key, factor)
        for name, kept in whole.items():
            writer.write(PREFIX + name, kept.read())
    ranks = {name.removesuffix(".weight"): update.rank for name, update in updates.items()}
    config = _config(ranks, base_model) | {"fan_in_fan_out": transposed, "task_type": task}
    write_json(folder / CONFIG, config | _saved(whole, tied=tied))


def _named_factors(
    updates: Mapping[str, LowRank], embeddings: Collection[str], *, transposed: bool
) -> dict[str, Tensor]:
    factors = {}
    for name, update in sorted(updates.items()):
        module = PREFIX + name.removesuffix(".weight")
        turned = transposed or name in embeddings
        down, up = (update.up.mT, update.down.mT) if turned else (update.down, update.up)
        pattern = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
        factors[f"{module}.{pattern.format('A')}"] = down
        factors[f"{module}.{pattern.format('B')}"] = up
    return factors


def _config(ranks: Mapping[str, int], base_model: str) -> dict[str, Any]:
    common = max(ranks.values())
    pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
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


def _saved(whole: Mapping[str, Whole], *, tied: bool) -> dict[str, Any]:
    if not whole:
        return {}
    modules = sorted({name.rpartition(".")[0] for name in whole})
    return {"modules_to_save": modules} | ({"ensure_weight_tying": True} if tied else {})
