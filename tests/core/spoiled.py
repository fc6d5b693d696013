"""Copies of tiny models that a test may spoil, and the merge that must refuse them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.errors import PoemergeError
from poemerge.merge import merge_checkpoints
from tests.zoo import Zoo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
NAME = "model.layers.1.mlp.up_proj.weight"


class Bench:
    """Copies of a base and its experts that a test may spoil, and the merge that must refuse."""

    def __init__(self, zoo: Zoo, root: Path) -> None:
        self.zoo, self.root = zoo, root
        self.out = root / "out"

    def base(self, *, sharded: bool = False) -> Path:
        return self.copy(self.zoo.base(sharded=sharded), "base")

    def full(self, seed: int = 1, *, sharded: bool = False) -> Path:
        return self.copy(self.zoo.full(seed, sharded=sharded), f"expert-{seed}")

    def adapter(self, seed: int = 1, **lora: object) -> Path:
        return self.copy(self.zoo.adapter(seed, **lora), f"adapter-{seed}")

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.root / name))

    def merge(self, *experts: Path, base: Path | None = None, **options: object) -> None:
        named = {folder.name: folder for folder in experts} or {"a": self.zoo.full(1)}
        settings = {"method": "cauchy_poe", "out": self.out} | options
        merge_checkpoints(base or self.zoo.base(), named, **settings)

    def refused(
        self,
        error: type[PoemergeError],
        pattern: str,
        *experts: Path,
        base: Path | None = None,
        **options: object,
    ) -> str:
        before = {path.name for path in self.root.iterdir()}
        with pytest.raises(error, match=pattern) as caught:
            self.merge(*experts, base=base, **options)
        assert {path.name for path in self.root.iterdir()} == before
        sentence = str(caught.value)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert ";" in sentence, "what to do?"
        return sentence


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite a safetensors file; its folder is returned."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path.parent


def change_json(path: Path, **changes: object) -> Path:
    """Set keys of a JSON file; its folder is returned."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    """An edit for `change` that sets the last entry of a tensor with `name` in its name."""

    def edit(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if name in key)
        tensors[key].flatten()[-1] = value

    return edit
