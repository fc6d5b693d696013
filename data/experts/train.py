"""Train one LoRA expert a task: `python data/experts/train.py [TASK ...]`, minutes each on 2 cores.

Prompt and answer are those that lm-eval scores, since its own task object writes them; the loss is
taken on the answer alone. What is stored is a plain PEFT adapter in fp16.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TASKS = Path("data/tasks")
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORED = -100  # label of a token that bears no loss


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; one recipe serves all tasks."""

    steps: int = 120
    batch: int = 16
    peak_rate: float = 1e-3  # learning rate after the warm-up, then a line down to 0
    warmup: int = 10  # steps
    rank: int = 8
    alpha: int = 16
    seed: int = 0

    def share_of_peak_rate(self, step: int) -> float:
        """A line up over the warm-up, then a line down to nothing at the last step."""
        return min((step + 1) / self.warmup, (self.steps - step) / self.steps)


class Example(NamedTuple):
    """Token ids of a prompt, and those that the right answer adds to it."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    """Padded token ids with their mask, and the labels of the last positions."""

    ids: Tensor  # (items, width)
    mask: Tensor  # (items, width), 0 where padded
    labels: Tensor  # (items, longest answer), IGNORED where there is no answer token


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


def batches(items: list[Example], recipe: Recipe, pad: int) -> Iterator[Batch]:
    """`recipe.steps` batches, every item once before any a second time."""
    order = random.Random(recipe.seed)
    queue: list[int] = []
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch:
            queue += order.sample(range(len(items)), len(items))
        yield _stacked([items[i] for i in queue[: recipe.batch]], pad)
        queue = queue[recipe.batch :]


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


def loss(model: PeftModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer tokens; only their logits are computed."""
    logits = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=batch.labels.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
    )


def train(name: str, base: Path, recipe: Recipe) -> PeftModel:
    """The base with a LoRA adapter on its attention, trained on one task."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, _lora(recipe)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.peak_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.share_of_peak_rate)
    data = batches(examples(name, tokenizer), recipe, tokenizer.eos_token_id)
    for step, batch in enumerate(data, start=1):
        value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        rate.step()
        if step % 25 == 0:
            logger.info("%s: step %d of %d, loss %.3f", name, step, recipe.steps, value.item())
    return model


def _lora(recipe: Recipe) -> LoraConfig:
    """LoRA on the four attention projections of every layer."""
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )


def store(model: PeftModel, folder: Path) -> None:
    """Write a PEFT folder: fp16 factors, and a config that names the base by its public name."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    halves = {key: value.half() for key, value in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    _sort_modules(folder / "adapter_config.json")


def _sort_modules(path: Path) -> None:
    """PEFT writes the module names as a set, in a new order each time."""
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train and store the experts of the named tasks, or of all."""
    known = sorted(path.stem for path in TASKS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=known, help="task names; default: all")
    parser.add_argument("--base", type=Path, default=Path("artifacts/fetch/base"))
    parser.add_argument("--out", type=Path, default=Path("data/experts"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    for name in args.tasks:
        store(train(name, args.base, Recipe()), args.out / name)


if __name__ == "__main__":
    main()
