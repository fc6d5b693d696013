"""`adapter_config.json` of a LoRA adapter in PEFT's format, as far as it enters the update."""

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

from poemerge.checkpoint import read_json
from poemerge.errors import CheckpointError

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
WILD, WILDEST = re.compile(r"[*+?{]"), 3  # signs in a pattern that may match any length
REPEATED = re.compile(r"\)[*+{]")  # of a group, within which others may repeat
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Patterns:
    """Values by pattern: the first that fits the end of a module's name counts, as in PEFT.

    There may be one for each module of a large model, escaped as PEFT wants it. Such are looked up.

    Args:
        values: regular expression → value.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._names: dict[str, tuple[int, Any]] = {}  # place among all, value
        self._others: list[tuple[int, Any, re.Pattern[str]]] = []
        for place, (pattern, value) in enumerate(values.items()):
            name = re.sub(r"\\(.)", r"\1", pattern)
            if re.escape(name) == pattern:
                self._names[name] = (place, value)
            else:
                self._others.append((place, value, re.compile(_ending(pattern))))

    def find(self, module: str, default: Any) -> Any:
        """The value for a module, or `default` where no pattern fits."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        others = ((place, value) for place, value, fit in self._others if fit.match(module))
        fits = [*(self._names[end] for end in ends if end in self._names), *islice(others, 1)]
        return min(fits)[1] if fits else default


@dataclass(frozen=True)
class LoraConfig:
    """The numbers of `adapter_config.json` that enter the update."""

    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    rslora: bool
    fan_in_fan_out: bool
    task: str | None  # PEFT's name for what the model is: CAUSAL_LM, SEQ_2_SEQ_LM, ...
    saved: tuple[str, ...] = ()  # PEFT's modules_to_save

    @classmethod
    def read(cls, path: Path) -> Self:
        """From `adapter_config.json`.

        Raises:
            CheckpointError: it is of no plain LoRA, or holds what PEFT does not write.
        """
        config = read_json(path)
        _check_plain(path, config)
        for key, is_sound in SOUND.items():
            value = config.get(key)
            if not (is_sound(value) or (value is None and key not in NEEDED)):
                raise CheckpointError(
                    f"{path} has {key}={reprlib.repr(value)}, which PEFT does not write; save the "
                    "adapter again."
                )
        return cls(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            rank_pattern=Patterns(config.get("rank_pattern") or {}),
            alpha_pattern=Patterns(config.get("alpha_pattern") or {}),
            rslora=bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            task=config.get("task_type"),
            saved=tuple(config.get("modules_to_save") or ()),
        )

    def saves(self, tensor: str) -> bool:
        """True for a tensor of a module that is trained and kept whole."""
        module = tensor.rpartition(".")[0]
        return any(module == name or module.endswith(f".{name}") for name in self.saved)

    def rank_of(self, module: str) -> int:
        """R for a module such as `model.layers.0.self_attn.q_proj`."""
        return int(self.rank_pattern.find(module, self.rank))

    def scaling_of(self, module: str) -> float:
        """The factor on lora_B · lora_A."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.find(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """See that two factors and a scaling say all that the adapter does."""
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


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) <= sys.float_info.max


def _is_table(value: object, is_sound: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(
        _is_pattern(key) and is_sound(inner) for key, inner in value.items()
    )


def _is_pattern(text: str) -> bool:
    """False for an expression that is none, or whose match might take for ever."""
    if len(WILD.findall(text)) > WILDEST or REPEATED.search(text):
        return False
    try:
        re.compile(_ending(text))
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


NEEDED = ("r", "lora_alpha")
SOUND: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "rank_pattern": partial(_is_table, is_sound=_is_rank),
    "alpha_pattern": partial(_is_table, is_sound=_is_alpha),
    "use_rslora": _is_flag,
    "fan_in_fan_out": _is_flag,
    "task_type": lambda value: isinstance(value, str),
    "modules_to_save": _are_names,
}


def _refuse(path: Path, key: str, value: object) -> NoReturn:
    raise CheckpointError(
        f"{path} has {key}={reprlib.repr(value)}, which plain LoRA factors do not express; merge "
        "it into its base with PEFT and give the full checkpoint."
    )


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
