"""Where the paper's experiments lie, and how models are loaded, asked and compared there."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.examples import tiny

ROOT = Path(__file__).parents[2] / "examples/paper"
FILES = sorted(path.name for path in ROOT.glob("*.yaml"))
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")


def copied(source: Path, folder: Path) -> Path:
    """A copy of a folder's files, for a test to change."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def strict(folder: Path, model: type) -> PreTrainedModel:
    """The model of a folder, every name of which must be the model's."""
    loaded, found = model.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return loaded.eval()


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and values that differ by rounding at most."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def say(model: Any) -> torch.Tensor:
    """Logits of an encoder-decoder on fixed tokens."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 90, (2, 9)), labels=torch.ones(2, 4).long()).logits


def look(model: Any) -> torch.Tensor:
    """What a vision tower sees in random pixels."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model(pixel_values=torch.randn(2, 3, tiny.SIDE, tiny.SIDE)).pooler_output
