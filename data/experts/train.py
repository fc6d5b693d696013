"""Train one expert a task: `python data/experts/train.py --kind lora|full --out DIR [TASK ...]`.

Prompt and answer are those that lm-eval scores, since its own task object writes them; the loss is
taken on the answer alone. An expert that is complete is left as it is, and one that was interrupted
goes on where its state was last saved, to the same bytes.
"""

import argparse
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
from batches import IGNORED, TASKS, Batch, batches, examples
from kinds import KINDS, Recipe, prepare, store
from torch import Tensor
from transformers import AutoTokenizer

from poemerge.device import describe_device, pick_device
from poemerge.layout import is_ready
from poemerge.lineage import Lineage, Source, package_versions, produce

logger = logging.getLogger(__name__)

STATE_EVERY = 20  # steps; a state is what is trained and its moments, 1.6 GB of a full fine-tune


def seed_of(task: str, seed: int) -> int:
    """A seed for each expert: other first factors, and another order of the items."""
    return int.from_bytes(hashlib.sha256(f"{task} {seed}".encode()).digest()[:4])


def record_of(
    task: str, base: Path, kind: str, recipe: Recipe, *, seed: int, device: torch.device
) -> Lineage:
    """What makes an expert: the base, the task's prompt and training items, recipe and seed."""
    inputs = (
        Source.of("base", base),
        Source.of_file("prompt", TASKS / f"{task}.yaml"),
        Source.of_file("items", TASKS / task / "train.jsonl"),
    )
    params = {"kind": kind, "task": task, "seed": seed, **asdict(recipe)}
    tools = {name: metadata.version(name) for name in ("lm_eval", "peft", "transformers")}
    packages = dict(package_versions()) | tools
    where = describe_device(device)
    # Poemerge shapes nothing.
    return Lineage("train", params, inputs, device=where, code={}, packages=packages)


def loss(model: torch.nn.Module, batch: Batch) -> Tensor:
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


class Training:
    """One expert in the making: model, optimiser and the number of steps done.

    Args:
        task: what it is trained for.
        base: the folder of the checkpoint to start from.
        recipe: how.
        seed: of the first factors and of the order of the items.
        device: where it is trained.
    """

    def __init__(
        self, task: str, base: Path, recipe: Recipe, seed: int, device: torch.device
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.task, self.recipe, self.done = task, recipe, 0
        self.device, self.model = device, prepare(base, recipe, seed).to(device)
        self.weights = {n: w for n, w in self.model.named_parameters() if w.requires_grad}
        self.optimiser = torch.optim.AdamW(self.weights.values(), weight_decay=0.0)
        items = examples(task, tokenizer)
        self.batches = batches(items, recipe.batch, seed, tokenizer.eos_token_id)

    def step(self, batch: Batch) -> float:
        """One step down the loss, which is returned."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(self.done)
        value = loss(self.model, batch.to(self.device))
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.done += 1
        return value.item()

    def run(self, state: Path, key: str) -> None:
        """All steps that are left; `state` holds what was done, if it was done under `key`."""
        self._load(state, key)
        begin = time.monotonic()
        for batch in islice(self.batches, self.done, self.recipe.steps):
            value = self.step(batch)
            if self.done % STATE_EVERY == 0:
                seconds = time.monotonic() - begin
                done = (self.task, self.done, self.recipe.steps, value, seconds)
                logger.info("%s: step %d of %d, loss %.3f, %.0f s", *done)
                self._save(state, key)

    def _save(self, state: Path, key: str) -> None:
        """Whole or not at all."""
        partial = state.with_name(f"{state.name}.partial")
        optimiser = self.optimiser.state_dict()
        found = {"key": key, "done": self.done, "weights": self.weights, "optimiser": optimiser}
        torch.save(found, partial)
        partial.replace(state)

    def _load(self, state: Path, key: str) -> None:
        """Go on from `state` if it is there and belongs to this very training."""
        if not state.exists():
            return
        found = torch.load(state, map_location=self.device, weights_only=True)
        if found["key"] != key:
            return
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(found["weights"][name])
        self.optimiser.load_state_dict(found["optimiser"])
        self.done = found["done"]
        logger.info("%s: goes on after step %d", self.task, self.done)


def make(
    task: str, base: Path, kind: str, out: Path, *, recipe: Recipe, seed: int, device: torch.device
) -> None:
    """Train and store the expert `out / task`, unless it is there already."""
    record = record_of(task, base, kind, recipe, seed=seed, device=device)
    state = out / f"{task}.state"

    def work(folder: Path) -> None:
        training = Training(task, base, recipe, seed_of(task, seed), device)
        training.run(state, record.key)
        store(training.model, base, folder)

    made = produce(out / task, record, work)
    state.unlink(missing_ok=True)
    logger.info("%s: %s", task, "done" if made else "was there already")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the experts of the named tasks, or of all."""
    known = sorted(path.stem for path in TASKS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=known, help="task names; default: all")
    parser.add_argument("--kind", choices=sorted(KINDS), default="lora")
    parser.add_argument("--seed", type=int, default=0, help="of the whole zoo")
    parser.add_argument("--steps", type=int, help="fewer or more than the recipe has")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    parser.add_argument("--base", type=Path, default=Path("artifacts/fetch/base"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the zoo")
    args = parser.parse_args(arguments)
    if unknown := sorted({*args.tasks} - {*known}):
        parser.error(f"no task is called {', '.join(unknown)}; known are {', '.join(known)}.")
    if not is_ready(args.base):
        parser.error(f"{args.base} holds no checkpoint; make it with `make demo`, or give --base.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    recipe = KINDS[args.kind]
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    how = {"recipe": recipe, "seed": args.seed, "device": pick_device(args.device)}
    for task in args.tasks:
        make(task, args.base, args.kind, args.out, **how)


if __name__ == "__main__":
    main()
