"""Zero-shot accuracy of the paper's vision towers: examples/paper/clip_zero_shot.py."""

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from poemerge.merge import merge_checkpoints
from tests.examples.conftest import Makers
from tests.examples.paper import ROOT


def zero_shot() -> ModuleType:
    """examples/paper/clip_zero_shot.py as a module."""
    spec = util.spec_from_file_location("clip_zero_shot", ROOT / "clip_zero_shot.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def draw(folder: Path, classes: int, each: int) -> list[tuple[Path, int]]:
    """Images of one colour with labels, in the order in which `datasets` reads them."""
    generator = np.random.default_rng(0)
    drawn = []
    for label in range(classes):
        (folder / "test" / f"class_{label}").mkdir(parents=True)
        for index in range(each):
            path = folder / "test" / f"class_{label}" / f"{index}.png"
            colour = tuple(generator.integers(0, 256, 3).tolist())
            Image.new("RGB", (24, 20), colour).save(path)
            drawn.append((path, label))
    return drawn


@pytest.mark.parametrize("task", ["mnist", "eurosat"])
def test_zero_shot_accuracy_is_that_of_transformers(
    task: str, makers: Makers, tmp_path: Path
) -> None:
    script, base = zero_shot(), makers.base("clip")
    merge_checkpoints(
        base, [makers.expert("clip", i, full=True) for i in (1, 2)], tmp_path / "merged", "average"
    )
    drawn = draw(tmp_path / "images", classes=3, each=7)
    command = ["--task", task, "--data", str(tmp_path / "images"), "--batch-size", "4"]
    ran = CliRunner().invoke(script.main, [*command, str(tmp_path / "merged")])
    assert ran.exit_code == 0, ran.output
    model = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    processor = CLIPImageProcessor.from_pretrained(base)
    tokens = AutoTokenizer.from_pretrained(base)
    found = []
    for path, _ in drawn:
        sums = []
        for name in ("class 0", "class 1", "class 2"):
            texts = [prompt.format(name) for prompt in script.TASKS[task].prompts]
            pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
            text = tokens(texts, padding=True, return_tensors="pt")
            with torch.no_grad():
                seen = model(**text, **pixels)
            mean = seen.text_embeds.mean(dim=0)
            sums.append(float(seen.image_embeds[0] @ (mean / mean.norm())))
        found.append(sums.index(max(sums)))
    assert len(set(found)) > 1
    right = sum(answer == label for answer, (_, label) in zip(found, drawn, strict=True))
    assert float(ran.stdout.split()[0]) == pytest.approx(right / len(drawn), abs=1e-4)


def test_zero_shot_sees_experts_as_updates_of_the_base(makers: Makers, tmp_path: Path) -> None:
    script, base = zero_shot(), makers.base("clip")
    expert = makers.expert("clip", 1, full=True)
    draw(tmp_path / "images", classes=3, each=7)
    merge_checkpoints(base, [expert], tmp_path / "same", "average")
    command = ["--task", "mnist", "--data", str(tmp_path / "images"), "--limit", "20"]
    by_base = CliRunner().invoke(
        script.main, [*command, "--base", str(base), str(base), str(expert)]
    )
    alone = CliRunner().invoke(script.main, [*command, str(base), str(tmp_path / "same")])
    assert by_base.exit_code == alone.exit_code == 0, by_base.output + alone.output
    scores = [[line.split()[:3] for line in r.stdout.splitlines()] for r in (by_base, alone)]
    assert scores[0] == scores[1]
    assert scores[0][0][1:] == ["20", "images"]
