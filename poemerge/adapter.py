"""A LoRA adapter in PEFT's format, kept in factors: A = scaling · (lora_B · lora_A).

The scaling is alpha / r, or alpha / √r for rslora, with r and alpha from the patterns where one
fits the module; it is applied once, here.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from poemerge.errors import CheckpointError
from poemerge.layout import ADAPTER
from poemerge.lora_config import LoraConfig
from poemerge.tensor_files import TensorFiles
from poemerge.update import LowRank

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."  # PEFT saves a copy of the embedding that it adapts
ORIGINAL = ".original_module."  # and one of a module that it keeps whole, where that was resized


class Adapter(TensorFiles):
    """A LoRA adapter folder.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        CheckpointError: it is no LoRA adapter, has DoRA or biases, or its files do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.lora = LoraConfig.read(folder / CONFIG)
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


def _base_name(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".modules_to_save", "").replace(BASE_LAYER, ".")
