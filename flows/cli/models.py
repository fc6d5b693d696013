"""Commands that make models by hand: merge, extract."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flows.cli.options import (
    anywhere_option,
    base_option,
    device_option,
    dtype_option,
    expert_option,
    experts_option,
    foreign_option,
    memory_option,
    method_option,
    out_option,
    overwrite_option,
    resolve,
    resolve_here,
    select_option,
    set_option,
    vocabulary_option,
)
from tasks.runners import RUNNERS


@click.command()
@base_option
@experts_option
@select_option
@method_option
@set_option
@anywhere_option
@device_option
@dtype_option
@vocabulary_option
@foreign_option
@click.option(
    "--output",
    default="full",
    show_default=True,
    type=click.Choice(["full", "adapter"]),
    help="A full model, or an exact merged adapter.",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Truncate a merged adapter, at the best. [exact]"
)
@click.option("--seed", default=0, show_default=True, help="Of whatever is drawn at random.")
@click.option(
    "--samples",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Draws from the posterior, written to OUT-samples/000, 001, ...",
)
@click.option(
    "--sampler",
    default="laplace",
    show_default=True,
    type=click.Choice(["laplace", "langevin"]),
    help="Of samples: Gaussian around the mode, or exact and slower.",
)
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Factor on the samples' variance.",
)
@memory_option
@overwrite_option
@click.option(
    "--runner",
    default="threads",
    show_default=True,
    type=click.Choice(RUNNERS),
    help="Where its shards are made: in this process, or as jobs (docs/runners.md).",
)
@click.option("--workers", type=click.IntRange(min=1), help="To start. [one for each device]")
@click.option("--address", help="Of a Dask or Ray cluster that runs already.")
def merge(
    base: str,
    experts: Sequence[str],
    wanted: Sequence[str],
    method: str,
    overrides: Sequence[str],
    out: str,
    device: str,
    memory: float | None,
    runner: str,
    workers: int | None,
    address: str | None,
    **choices: Any,
) -> None:
    """Merge experts into one model folder.

    SRC is a folder, a PEFT adapter folder, a .gguf file, hf://org/name@revision, dvc://path,
    models:/name@alias, models:/name/version, package://name/path, or the URL of a folder in an
    object storage, such as s3://bucket/folder, of which ranges are read (docs/howto/storage.md).
    """
    from flows.console import show_report, start_logging, tensor_progress
    from flows.overrides import in_bytes, parse_settings
    from flows.turns import turn

    start_logging()
    settings = parse_settings(overrides)
    folders = resolve(base, experts, wanted)
    from poemerge.merge import merge_checkpoints  # imports torch, while the inputs are hashed
    from tasks.runners import open_runner

    choices |= {"device": device, "memory": in_bytes(memory)}
    choices["runner"] = open_runner(runner, workers, address, device=device)
    with turn([device]), tensor_progress("merging") as progress:
        report = merge_checkpoints(
            folders.pop("base"), folders, out, method, progress=progress, **choices, **settings
        )
    show_report(report, out, samples=choices["samples"])


@click.command()
@base_option
@expert_option
@click.option("--rank", required=True, type=int, help="Of every matrix, 1 or more.")
@out_option
@click.option(
    "--svd",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "exact", "randomised"]),
    help="auto: exact where that takes seconds a matrix.",
)
@click.option(
    "--vectors",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "drop"]),
    help="Norms and all else that is no matrix: whole, or not at all.",
)
@click.option(
    "--vocabulary",
    default="factors",
    show_default=True,
    type=click.Choice(["factors", "drop", "keep"]),
    help="Embedding and untied head.",
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the factors; computed in fp32 or better.",
)
@device_option
@overwrite_option
def extract(base: str, expert: str, rank: int, out: Path, **choices: Any) -> None:
    """Make the best low-rank adapter of a full fine-tune.

    The result is a PEFT adapter, and an expert for `poemerge merge`. Biases of layers in factors
    are dropped with a warning, since plain LoRA cannot hold them.
    """
    from flows.console import show_extraction, start_logging, tensor_progress
    from flows.turns import turn
    from poemerge.extract import extract_adapter

    start_logging()
    folders = resolve_here(base, [expert])
    source = folders.pop("base")
    (tuned,) = folders.values()
    with turn([choices["device"]]), tensor_progress("extracting") as progress:
        report = extract_adapter(source, tuned, out, rank, progress=progress, **choices)
    show_extraction(report, out)
