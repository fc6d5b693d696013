"""Inputs that look right and are not: made of tiny real models, at random by a number."""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge import MergeReport, merge_checkpoints
from poemerge.errors import PoemergeError
from poemerge.merging.plan import plan_merge
from poemerge.merging.terms import STRICT, Terms
from tests.zoo import Zoo

FILE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
METHODS = ("average", "ties", "gaussian_poe", "cauchy_poe", "tsv_m")


class Trap:
    """One trial: what is drawn in it, and where its files lie.

    Args:
        zoo: of tiny models.
        root: of all trials.
        number: seeds this one.
    """

    def __init__(self, zoo: Zoo, root: Path, number: int) -> None:
        self.zoo, self.root = zoo, root / str(number)
        self.root.mkdir()
        self.draw = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.method = self.draw.choice(METHODS)

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.root / name))

    def full(self, name: str = "trapped", **how: object) -> Path:
        """A full fine-tune that may be spoilt."""
        return self.copy(self.zoo.full(self.draw.randint(1, 4), **how), name)

    def other(self, **how: object) -> Path:
        """A sound one, never equal to that."""
        return self.zoo.full(self.draw.randint(5, 8), **how)

    def among(self, folder: Path, **how: object) -> dict[str, Path]:
        """The spoilt expert first or last, beside a sound one."""
        experts = [("trapped", folder), ("sound", self.other(**how))]
        self.draw.shuffle(experts)
        return dict(experts)

    def merge(
        self, experts: Mapping[str, Path], base: Path | None = None, **options: object
    ) -> tuple[MergeReport, dict[str, Tensor]]:
        """The report, and the merged weights."""
        out = self.root / f"out-{len(list(self.root.iterdir()))}"
        given = {"method": self.method, "device": "cpu"} | options
        report = merge_checkpoints(base or self.zoo.base(), experts, out, **given)
        file = FILE if (out / FILE).exists() else ADAPTER
        return report, load_file(out / file)

    def notes(
        self, experts: Mapping[str, Path], base: Path | None = None, terms: Terms = STRICT
    ) -> tuple[str, ...]:
        """What `poemerge check` says before a merge."""
        with plan_merge(base or self.zoo.base(), experts, self.method, {}, terms) as plan:
            return plan.notes

    def refused(
        self,
        pattern: str,
        experts: Mapping[str, Path],
        base: Path | None = None,
        *,
        deep: bool = False,
        **options: str,
    ) -> None:
        """By check and by merge, in one sentence that says what to do; nothing is left."""
        before = sorted(self.root.iterdir())
        with pytest.raises(PoemergeError, match=pattern) as caught:
            self.notes(experts, base, Terms(deep=deep, **options))
        with pytest.raises(PoemergeError, match=pattern):
            self.merge(experts, base, **options)
        sentence = str(caught.value)
        assert sentence.endswith(".")
        assert ";" in sentence
        assert "\n" not in sentence
        assert sorted(self.root.iterdir()) == before

    def warned(
        self, part: str, experts: Mapping[str, Path], base: Path | None = None, **options: str
    ) -> MergeReport:
        """By check, report and card, once each."""
        assert sum(part in note for note in self.notes(experts, base, Terms(**options))) == 1
        report, _ = self.merge(experts, base, **options)
        assert sum(part in warning for warning in report.warnings) == 1
        cards = [path.read_text("utf-8") for path in self.root.glob("out-*/README.md")]
        assert cards[-1].count(part) == 1
        return report


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = FILE) -> Path:
    """Rewrite the weights of a folder."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def change_json(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return path.parent


def made_of(root: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint of these tensors alone."""
    folder = root / name
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / FILE)
    return folder
