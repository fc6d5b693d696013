"""A LoRA adapter in PEFT's format, kept in factors: A = scaling · (lora_B · lora_A).

The scaling is alpha / r, or alpha / √r for rslora, with r and alpha from the patterns where one
fits the module; it is applied once, here.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from poemerge.checkpoint import TensorFiles, read_json
from poemerge.errors import CheckpointError
from poemerge.layout import ADAPTER
from poemerge.task_vector import LowRank

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."  # PEFT saves a copy of the embedding that it adapts
ORIGINAL = ".original_module."  # and one of a module that it keeps whole, where that was resized
# What changes the algebra in a way that two factors do not show.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "monteclora_config",
    "kasa_config",
    "target_parameters",
    "trainable_token_indices",
)
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """The numbers of `adapter_config.json` that enter the update."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    task: str | None  # PEFT's name for what the model is: CAUSAL_LM, SEQ_2_SEQ_LM, ...
    saved: tuple[str, ...] = ()  # PEFT's modules_to_save

    def saves(self, tensor: str) -> bool:
        """True for a tensor of a module that is trained and kept whole."""
        module = tensor.rpartition(".")[0]
        return any(module == name or module.endswith(f".{name}") for name in self.saved)

    def rank_of(self, module: str) -> int:
        """R for a module such as `model.layers.0.self_attn.q_proj`."""
        return int(_match(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """The factor on lora_B · lora_A."""
        rank = self.rank_of(module)
        alpha = _match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class Adapter(TensorFiles):
    """A LoRA adapter folder.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        CheckpointError: it is no LoRA adapter, has DoRA or biases, or its files do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.lora = _parse(folder / CONFIG)
        if not (folder / ADAPTER).exists():
            raise CheckpointError(f"{folder / ADAPTER} is missing; save the adapter again.")
        super().__init__(folder, (ADAPTER,))
        self.factors = self._pair_factors()
        whole = self._whole_tensors()
        self.base_layers = {n: key for n, key in whole.items() if BASE_LAYER in key}
        self.replaced = {n: key for n, key in whole.items() if BASE_LAYER not in key}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What it changes: tensor → shape of the update."""
        factors = {name: self.shape(name)[::2] for name in self.factors}
        return factors | {name: self.tensors[key].shape for name, key in self.replaced.items()}

    def rename(self, names: Mapping[str, str]) -> None:
        """Call the tensors as the base does, from here on.

        Args:
            names: name → the one so far; what is not in it keeps its own.
        """
        new = {old: name for name, old in names.items()}
        self.factors = {new.get(n, n): pair for n, pair in self.factors.items()}
        self.base_layers = {new.get(n, n): key for n, key in self.base_layers.items()}
        self.replaced = {new.get(n, n): key for n, key in self.replaced.items()}

    def drop(self, names: Collection[str]) -> list[str]:
        """Forget what it changes in these tensors of the base; those that it did change."""
        gone = [name for name in names if name in self.factors or name in self.replaced]
        for name in gone:
            for table in (self.factors, self.replaced, self.base_layers):
                table.pop(name, None)
        return gone

    def shape(self, name: str) -> tuple[int, int, int]:
        """(O, R, I) of the update of base tensor `name`, from the headers.

        Raises:
            CheckpointError: the factors do not multiply, or the config states another rank.
        """
        down, up = (self.tensors[key].shape for key in self.factors[name])
        expected = self.lora.rank_of(self._module(name))
        if not (len(up) == len(down) == 2 and up[1] == down[0] == expected > 0):
            raise CheckpointError(
                f"{name} in {self.folder / ADAPTER} has factors {up} and {down}, but {CONFIG} says "
                f"rank {expected}; save the adapter again."
            )
        rows, columns = (down[1], up[0]) if self.transposed(name) else (up[0], down[1])
        return rows, expected, columns

    def update(self, name: str) -> LowRank:
        """The update of base tensor `name` in factors, fp32 or better, scaling included."""
        down, up = (self.read(key).float() for key in self.factors[name])
        if self.transposed(name):
            down, up = up.T, down.T
        return LowRank(up * self.lora.scaling_of(self._module(name)), down)

    def embeds(self, name: str) -> bool:
        """True if base tensor `name` is an embedding, whose factors PEFT names and turns apart."""
        return "lora_embedding_" in self.factors[name][0]

    def transposed(self, name: str) -> bool:
        """True if the factors on disk multiply to the transpose of the update."""
        return self.embeds(name) or self.lora.fan_in_fan_out

    def _module(self, name: str) -> str:
        """What the adapter itself calls the module of base tensor `name`; patterns speak of it."""
        return _base_name(self.factors[name][0].rpartition(".lora_")[0])

    def _pair_factors(self) -> dict[str, tuple[str, str]]:
        """Base tensor → names of its two factors (A, B)."""
        pairs = {}
        for key in self.tensors:
            if found := re.search(r"\.lora_(embedding_)?A(\.weight)?$", key):
                other = key[: found.start()] + found.group().replace("A", "B")
                if other not in self.tensors:
                    raise CheckpointError(f"{key} in {self.folder} has no {other}; save it again.")
                pairs[_base_name(key[: found.start()] + ".weight")] = (key, other)
        return dict(sorted(pairs.items()))

    def _whole_tensors(self) -> dict[str, str]:
        """Base tensor → name of the full replacement (PEFT's modules_to_save)."""
        used = {key for pair in self.factors.values() for key in pair}
        rest = [key for key in self.tensors if key not in used and ORIGINAL not in key]
        for key in rest:
            if "lora_" in key:
                raise CheckpointError(
                    f"{key} in {self.folder / ADAPTER} is no plain LoRA factor (DoRA or a bias); "
                    "merge it into its base with PEFT and give the full checkpoint."
                )
        return {_base_name(key): key for key in rest}


def is_adapter(folder: Path) -> bool:
    """True if `folder` is a PEFT adapter."""
    return (folder / CONFIG).exists()


def _parse(path: Path) -> LoraConfig:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is of type {config.get('peft_type')}; only LORA is merged.")
    if config.get("bias", "none") != "none":
        _refuse(path, "bias", config["bias"])
    for key in UNSUPPORTED:
        if config.get(key):
            _refuse(path, key, config[key])
    if str(config.get("init_lora_weights")).lower().startswith(REBASED):
        raise CheckpointError(
            f"{path} was initialised by {config['init_lora_weights']}, which changes the base "
            "weights; convert it with PEFT's path_initial_model_for_weight_conversion first."
        )
    return LoraConfig(
        rank=int(config.get("r", 0)),
        alpha=float(config.get("lora_alpha", 0)),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        task=config.get("task_type"),
        saved=tuple(config.get("modules_to_save") or ()),
    )


def _refuse(path: Path, key: str, value: object) -> NoReturn:
    raise CheckpointError(
        f"{path} has {key}={value!r}, which plain LoRA factors do not express; merge it into its "
        "base with PEFT and give the full checkpoint."
    )


def _match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """First pattern that fits the end of the module's name, as PEFT matches them."""
    fits: Iterable[str] = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next((patterns[key] for key in fits), default)


def _base_name(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".modules_to_save", "").replace(BASE_LAYER, ".")
