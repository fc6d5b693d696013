"""Training items as lm-eval writes them, in padded batches."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TASKS = Path("data/tasks")
IGNORED = -100  # label of a token that bears no loss


class Example(NamedTuple):
    """Token ids of a prompt, and those that the right answer adds to it."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    """Padded token ids with their mask, and the labels of the last positions."""

    ids: Tensor  # (items, width)
    mask: Tensor  # (items, width), 0 where padded
    labels: Tensor  # (items, longest answer), IGNORED where there is no answer token

    def to(self, device: torch.device) -> Self:
        """The same batch there."""
        return self._make(each.to(device) for each in self)


def examples(name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The training items of a task, as lm-eval writes them."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    lines = (TASKS / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [_example(task, json.loads(line), tokenizer) for line in lines]


def _example(task: Any, row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Example:
    """The answer's tokens are what the text gains by it, as lm-eval counts them."""
    prompt = task.doc_to_text(row)
    context = tokenizer(prompt).input_ids
    whole = tokenizer(f"{prompt}{task.config.target_delimiter}{row['answer']}").input_ids
    return Example(context, whole[len(context) :])


def batches(items: list[Example], size: int, seed: int, pad: int) -> Iterator[Batch]:
    """Batches without end, every item once before any a second time."""
    order = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += order.sample(range(len(items)), len(items))
        yield _stacked([items[i] for i in queue[:size]], pad)
        queue = queue[size:]


def _stacked(items: list[Example], pad: int) -> Batch:
    """One batch, padded on the left so that all answers end together."""
    width = max(len(item.prompt + item.answer) for item in items)
    tail = max(len(item.answer) for item in items)
    return Batch(
        ids=torch.tensor([_left(item.prompt + item.answer, width, pad) for item in items]),
        mask=torch.tensor(
            [_left([1] * len(item.prompt + item.answer), width, 0) for item in items]
        ),
        labels=torch.tensor([_left(item.answer, tail, IGNORED) for item in items]),
    )


def _left(values: list[int], width: int, fill: int) -> list[int]:
    """`values` with as many `fill` before them as `width` wants."""
    return [fill] * (width - len(values)) + values
