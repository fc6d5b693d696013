"""Zero-shot accuracy of CLIP models on images: merges, and the base and experts they came from.

python examples/paper/clip_zero_shot.py --task eurosat MERGED [MERGED ...]
python examples/paper/clip_zero_shot.py --task eurosat --base BASE BASE EXPERT [EXPERT ...]

lm-eval knows no image classification. An image is of the class whose prompts, seen by the text
tower, are nearest to what the vision tower sees (Radford et al. 2021, section 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from poemerge.device import pick_device
from poemerge.merge import expert_weights
from tasks.evaluate.scorer import put_weights

VIEWS = ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo")
VIEWS += ("satellite view", "aerial view")
SHOTS = ("zoomed in", "centered", "close up")


@dataclass(frozen=True)
class Task:
    """A data set of images with labels, and the prompts that name a class."""

    data: str
    prompts: tuple[str, ...]
    config: str | None = None


TASKS = {
    "sun397": Task("tanganke/sun397", ("a photo of a {}.", "a photo of the {}.")),
    "cars": Task(
        "tanganke/stanford_cars",
        (
            *("a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!"),
            *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
        ),
    ),
    "resisc45": Task(
        "tanganke/resisc45",
        tuple(f"{view} of {article}{{}}." for article, view in product(("", "a ", "the "), VIEWS)),
    ),
    "eurosat": Task(
        "tanganke/eurosat",
        tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    ),
    "svhn": Task("ufldl-stanford/svhn", ('a photo of the number: "{}".',), "cropped_digits"),
    "gtsrb": Task(
        "tanganke/gtsrb",
        tuple(f'a {how} photo of a "{{}}" traffic sign.' for how in SHOTS),
    ),
    "mnist": Task("ylecun/mnist", ('a photo of the number: "{}".',)),
    "dtd": Task(
        "tanganke/dtd",
        tuple(
            f"a photo of {article} {{}} {thing}."
            for article, thing in product(("a", "the"), ("texture", "pattern", "thing", "object"))
        ),
    ),
}


def class_heads(
    model: CLIPModel, tokenizer: Any, classes: Sequence[str], prompts: Sequence[str]
) -> Tensor:
    """Directions of the classes, (C, D), each the mean over its prompts, of length 1."""
    heads = []
    for name in classes:
        texts = [prompt.format(name.replace("_", " ")) for prompt in prompts]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        seen = model.get_text_features(**tokens).pooler_output  # (P, D)
        heads.append(normalize(normalize(seen, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(heads)


def accuracy(model: CLIPModel, processor: Any, heads: Tensor, data: Any, batch_size: int) -> float:
    """Part of the images whose nearest class is their label."""
    right = 0
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        images = [image.convert("RGB") for image in batch["image"]]
        pixels = processor(images=images, return_tensors="pt").to(model.device)
        seen = model.get_image_features(**pixels).pooler_output  # (B, D)
        found = (seen @ heads.mT).argmax(dim=-1).cpu()
        right += int((found == torch.tensor(batch["label"])).sum())
    return right / len(data)


@click.command()
@click.argument("candidates", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(list(TASKS)), required=True, help="Prompts and data set.")
@click.option("--data", help="Folder or hub name of images, in place of the task's own.")
@click.option("--split", default="test", show_default=True, help="Of the data set.")
@click.option(
    "--base", type=click.Path(path_type=Path), help="Model that CANDIDATES are experts of."
)
@click.option("--limit", type=click.IntRange(min=1), help="Images at most, from the first.")
@click.option("--batch-size", default=64, show_default=True, help="Images per forward pass.")
@click.option("--device", default="auto", show_default=True, help="auto | cpu | cuda[:i]")
@torch.inference_mode()
def main(  # noqa: PLR0917
    candidates: tuple[Path, ...],
    task: str,
    data: str | None,
    split: str,
    base: Path | None,
    limit: int | None,
    batch_size: int,
    device: str,
) -> None:
    """Score CANDIDATES, folders of complete CLIP models, or of experts where --base is given."""
    known = TASKS[task]
    images = load_dataset(data or known.data, None if data else known.config, split=split)
    classes = getattr(images.features["label"], "names", None)
    if classes is None:
        raise click.UsageError(f"The labels of {data or known.data} have no names.")
    images = images.select(range(min(limit or len(images), len(images))))
    complete = base or candidates[0]
    model = CLIPModel.from_pretrained(complete).to(pick_device(device)).eval()
    tokenizer = AutoTokenizer.from_pretrained(complete)
    processor = CLIPImageProcessor.from_pretrained(complete)
    for folder in candidates:
        weights = expert_weights(base, folder) if base else expert_weights(folder, None)
        put_weights(model, weights, str(folder))
        heads = class_heads(model, tokenizer, classes, known.prompts)
        score = accuracy(model, processor, heads, images, batch_size)
        click.echo(f"{score:.4f}  {len(images)} images  {folder}")


if __name__ == "__main__":
    main()
