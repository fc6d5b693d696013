"""What makes a result right although its input was spoiled: read by others than poemerge.

Each function looks at the folder of a case that was not refused, and fails unless the input can
stand as it is and what was made of it is what it says.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

SINGLE, INDEX, ADAPTER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
PREFIX = "base_model.model."
RTOL = 1e-5


def weights(folder: Path, way: str) -> None:
    """Checkpoints and adapters: the library reads them, and what was made has its numbers."""
    if way == "fetch":
        same_files(folder)
        return
    base, expert = tensors(folder / "base"), tensors(folder / "expert")
    for name in ("base", "expert"):
        config(folder / name)
    if (folder / "expert/adapter_config.json").exists():
        expert = adapted(base, expert, strict_json(folder / "expert/adapter_config.json"))
    if way.endswith("merge"):
        equal(tensors(folder / "out"), {n: expert.get(n, w) for n, w in base.items()}, base)
    if way.endswith("extract"):
        made = adapted(
            base, tensors(folder / "out"), strict_json(folder / "out/adapter_config.json")
        )
        equal(made, {name: expert.get(name, w) for name, w in base.items()}, base, loose=1e-4)


def same_files(folder: Path) -> None:
    """A copy is what it was made from."""
    for path in (folder / "out").iterdir():
        if path.name != "lineage.json":
            assert path.read_bytes() == (folder / "expert" / path.name).read_bytes()


def equal(
    made: dict[str, Tensor], right: dict[str, Tensor], base: dict[str, Tensor], loose: float = RTOL
) -> None:
    """The same names, and numbers as near as their dtype lets them be; integers are the base's."""
    assert made.keys() == base.keys()
    for name, weight in made.items():
        assert weight.dtype == base[name].dtype, name
        expected = right[name] if weight.is_floating_point() else base[name]
        largest = float(expected.double().abs().max()) if expected.numel() else 0.0
        atol = loose * max(1.0, largest)  # what cancels has the rounding of what was large
        torch.testing.assert_close(weight.double(), expected.double(), rtol=loose, atol=atol)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as the safetensors library reads them from bytes."""
    files = [name for name in (ADAPTER, SINGLE) if (folder / name).is_file()][:1]
    if (folder / INDEX).exists():
        files = sorted(set(strict_json(folder / INDEX)["weight_map"].values()))
    assert files, f"{folder} holds no weights"
    found: dict[str, Tensor] = {}
    for file in files:
        assert Path(file).name == file
        found |= load((folder / file).read_bytes())
    if (folder / INDEX).exists():
        assert strict_json(folder / INDEX)["weight_map"].keys() <= found.keys()
    return found


def adapted(base: dict[str, Tensor], own: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Base + scaling · B · A, as PEFT defines it; whole tensors in the place of the base's."""
    assert config["peft_type"] == "LORA"
    assert config.get("bias", "none") == "none"
    assert not any(config.get(key) for key in ("use_dora", "lora_bias", "layer_replication"))
    made = dict(base)
    for key, down in own.items():
        found = re.match(r"(?:base_model\.model\.)?(.*)\.lora_(embedding_)?A(\.weight)?$", key)
        if found:
            module, embedding, _ = found.groups()
            up = own[key[: found.end(1)] + key[found.end(1) :].replace("A", "B")]
            update = scaling(config, module, len(down)) * (up.double() @ down.double())
            update = update.T if embedding or config.get("fan_in_fan_out") else update
            made[f"{module}.weight"] = (base[f"{module}.weight"].double() + update).float()
        elif ".lora_" not in key:
            made[key.removeprefix(PREFIX)] = down
    return {name: made[name] for name in base}


def scaling(config: Any, module: str, rank: int) -> float:
    """Alpha / r, or alpha / √r; of the right types, and as the patterns say."""
    stated = _fitting(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _fitting(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    assert type(stated) is int
    assert type(alpha) in {int, float}
    assert stated == rank
    assert math.isfinite(alpha)
    assert config.get("use_rslora") in {None, True, False}
    assert config.get("fan_in_fan_out") in {None, True, False}
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fitting(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's way: the first pattern that the end of the module's name matches."""
    fits = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next((patterns[key] for key in fits), default)


def config(folder: Path) -> None:
    """What poemerge asks of a config.json has the type that transformers gives it."""
    path = folder / "config.json"
    if not path.exists():
        return
    assert path.is_file(), f"{path} was taken for a config"  # to read a FIFO takes for ever
    tree = strict_json(path)
    assert isinstance(tree, dict)
    text = tree.get("text_config", tree)
    assert isinstance(text, dict | None)
    assert "quantization_config" not in tree
    for part in (tree, text or {}):
        assert type(part.get("vocab_size")) in {int, type(None)}
        assert type(part.get("tie_word_embeddings")) in {bool, type(None)}
    assert type(tree.get("model_type")) in {str, type(None)}
    assert type(tree.get("architectures")) in {list, type(None)}


def strict_json(path: Path) -> Any:
    """JSON as its standard has it, but for NaN and infinity, which Python writes too."""
    return json.loads(path.read_bytes().decode("utf-8"))
