r"""Is an ensemble of merges better calibrated than the merge? Mode + posterior draws on one task.

    python examples/ensemble.py --base artifacts/fetch/base --task data/tasks/spam.yaml \
        --expert data/experts/spam --expert data/experts/reviews --samples 8 --temperature 1

Every model answers by the softmax over the likelihoods of the choices; the ensemble answers by the
mean of these (docs/posterior.md).
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from poemerge import merge_checkpoints
from poemerge.merge import SAMPLES, expert_weights

BINS = 10  # of confidence, equally wide
BATCH = 32  # sequences a forward pass


@dataclass(frozen=True)
class Task:
    """Items of a multiple-choice task, as the lm-eval task of data/tasks/ states it."""

    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    labels: Tensor  # (N,)

    @classmethod
    def read(cls, path: Path, split: str, limit: int) -> "Task":
        """Read the YAML of a task and the first items of a split, which lies beside it."""
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        lines = (path.with_suffix("") / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines[:limit]]
        choices = tuple(task["doc_to_choice"])
        prompts = tuple(task["doc_to_text"].replace("{{text}}", item["text"]) for item in items)
        return cls(prompts, choices, torch.tensor([choices.index(i["answer"]) for i in items]))


@dataclass(frozen=True)
class Calibration:
    """How good and how honest answers are.

    Attributes:
        accuracy: of the likeliest choice.
        nll: mean negative log-likelihood of the right choice, nats.
        ece: expected calibration error, mean |confidence - accuracy| over bins of confidence
            (Guo et al. 2017, arXiv 1706.04599).
    """

    accuracy: float
    nll: float
    ece: float

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> "Calibration":
        """Of answers (N, choices) whose right ones are `labels` (N,)."""
        confidence, answer = probabilities.max(dim=-1)
        right = (answer == labels).double()
        places = (confidence * BINS).long().clamp_max(BINS - 1)
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, places, confidence - right)
        chosen = probabilities.gather(-1, labels.unsqueeze(-1))
        return cls(
            accuracy=float(right.mean()),
            nll=float(-chosen.log().mean()),
            ece=float(gaps.abs().sum() / len(labels)),
        )


@torch.inference_mode()
def answers(weights: Iterator[tuple[str, Tensor]] | None, like: Path, task: Task) -> Tensor:
    """Probabilities of the choices (N, choices), in fp64.

    Args:
        weights: of the model, by name; None for those in `like`.
        like: model folder that holds config and tokenizer.
        task: whose items are answered.
    """
    tokenizer = AutoTokenizer.from_pretrained(like)
    model = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float32).eval()
    if weights is not None:
        model.load_state_dict(dict(weights), strict=False)
    starts = [tokenizer(prompt).input_ids for prompt in task.prompts]
    ends = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in task.choices]
    rows = [(start, end) for start in starts for end in ends]
    found = [likelihoods(model, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    return torch.cat(found).unflatten(0, (-1, len(task.choices))).softmax(dim=-1)


def likelihoods(model: torch.nn.Module, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Log-likelihood of each end after its start (B,), in fp64."""
    wide = max(len(start) + len(end) for start, end in rows)
    tokens = torch.zeros(len(rows), wide, dtype=torch.int64)
    asked = torch.zeros(len(rows), wide, dtype=torch.bool)
    for row, (start, end) in enumerate(rows):
        stop = len(start) + len(end)
        tokens[row, :stop] = torch.tensor([*start, *end])
        asked[row, len(start) : stop] = True
    # What is padded on the right is never seen by what stands before it.
    logits = model(input_ids=tokens).logits[:, :-1].double().log_softmax(dim=-1)
    each = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (each * asked[:, 1:]).sum(dim=-1)


def compare(
    base: Path,
    experts: Sequence[Path],
    task: Task,
    work: Path,
    *,
    samples: int,
    temperatures: Sequence[float],
    method: str = "cauchy_poe",
    sampler: str = "laplace",
) -> dict[str, Calibration]:
    """Base, experts, mode and ensembles on one task, in this order.

    Args:
        base: model folder.
        experts: checkpoint or adapter folders.
        task: that is answered.
        work: folder for the merges.
        samples: draws of an ensemble, beside the mode.
        temperatures: of the ensembles.
        method: a product of experts.
        sampler: `laplace` or `langevin`.
    """
    found = {"base": answers(None, base, task)}
    for expert in experts:
        found[f"expert {expert.name}"] = answers(expert_weights(base, expert), base, task)
    merged = work / "merged"
    for temperature in temperatures:
        merge_checkpoints(
            base, experts, merged, method, samples=samples, sampler=sampler,
            temperature=temperature, overwrite=True,
        )  # fmt: skip
        if "mode" not in found:  # the same at every temperature
            found["mode"] = answers(None, merged, task)
        drawn = [answers(None, f, task) for f in sorted(Path(f"{merged}{SAMPLES}").iterdir())]
        found[f"one draw, T {temperature:g}"] = drawn[0]
        found[f"mode + {samples} draws, T {temperature:g}"] = torch.stack(
            [found["mode"], *drawn]
        ).mean(0)
    return {name: Calibration.of(answer, task.labels) for name, answer in found.items()}


@click.command()
@click.option("--base", required=True, type=click.Path(path_type=Path))
@click.option("--expert", "experts", required=True, multiple=True, type=click.Path(path_type=Path))
@click.option("--task", required=True, type=click.Path(path_type=Path), help="YAML of the task.")
@click.option("--split", default="test", show_default=True)
@click.option("--limit", default=200, show_default=True, help="Items.")
@click.option("--samples", default=8, show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=(1.0,))
@click.option("--method", default="cauchy_poe", show_default=True)
@click.option("--sampler", default="laplace", show_default=True)
def main(
    base: Path, experts: Sequence[Path], task: Path, split: str, limit: int, **choices: Any
) -> None:
    """Print accuracy, negative log-likelihood and calibration error of every model."""
    disable_progress_bar()
    read = Task.read(task, split, limit)
    with tempfile.TemporaryDirectory() as work:
        table = compare(base, experts, read, Path(work), **choices)
    click.echo(f"{'model':28} accuracy    NLL    ECE   ({len(read.labels)} items)")
    for name, found in table.items():
        click.echo(f"{name:28} {found.accuracy:8.3f} {found.nll:6.3f} {found.ece:6.3f}")


if __name__ == "__main__":
    main()
