"""The command line: `poemerge`. Heavy imports wait until a command needs them."""

import atexit
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from poemerge.errors import PoemergeError, SettingError
from poemerge.version import VERSION

REFUSED, INTERRUPTED = 1, 3
CACHE = "POEMERGE_CACHE"
GARBAGE = 50_000  # new objects between collections; imports make many, and none is garbage

# Nothing leaves the machine unasked, and our own lines are the ones to read.
QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "poemerge,tasks,flows",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # a busy machine takes its time
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are ten times slower on a machine in use
}


def calm_down() -> None:
    """Set what the libraries read when they are first imported; what the user has set stays."""
    gc.set_threshold(GARBAGE)
    atexit.register(gc.freeze)  # or the interpreter would look at all of them once more: 0.2 s
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


class Sentences(click.Group):
    """A group whose commands end refusals with one sentence and exit code 1."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except PoemergeError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(REFUSED)
        except KeyboardInterrupt:
            click.echo("interrupted: run the same command again to go on.", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=Sentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="poemerge")
def main() -> None:
    """Merge fine-tuned models as products of experts, and look after the result."""
    calm_down()


_params = click.option(
    "--params",
    default="params.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Parameter file.",
)
_set = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Replace one value; repeatable."
)
_base = click.option("--base", required=True, metavar="SRC", help="Checkpoint they share.")
_experts = click.option(
    "--expert",
    "experts",
    required=True,
    multiple=True,
    metavar="[NAME=]SRC",
    help="Fine-tuned checkpoint or PEFT adapter; repeatable.",
)
_method = click.option(
    "--method", default="cauchy_poe", show_default=True, help="See `poemerge methods`."
)
_expert = click.option("--expert", required=True, metavar="SRC", help="Full fine-tune of the base.")
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace --out where it exists.")
_memory = click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Keep the whole process within; slower where it is tight.",
)
_device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:i]",
    help="Where to solve.",
)


@main.command()
@_params
@_set
@click.option("--save", is_flag=True, help="Write the --set values into the parameter file first.")
def run(params: Path, overrides: Sequence[str], *, save: bool) -> None:
    """Run the whole pipeline: fetch, task_vectors, merge, evaluate, register, report.

    What is up to date is not done again. With --set, params.yaml and dvc.lock stay as they are
    unless --save is given.
    """
    from flows.console import show_outcome, start_logging
    from flows.overrides import save_overrides
    from flows.params import load

    load(params, overrides)
    if save:
        save_overrides(params, overrides)
        overrides = ()
    start_logging()
    logging.getLogger(__name__).info("starting Prefect (some 10 s where no server is running)")
    from flows.pipeline import pipeline

    show_outcome(pipeline(str(params), list(overrides)))


@main.command()
@_params
@_set
@click.option(
    "--method", "labels", multiple=True, metavar="LABEL", help="Search this one; repeatable. [all]"
)
@click.option("--save", is_flag=True, help="Write each method's best into merge.methods.")
def sweep(params: Path, overrides: Sequence[str], labels: Sequence[str], *, save: bool) -> None:
    """Search the settings in params.yaml's `sweep` on validation; show each method's best on test.

    A sweep that was stopped goes on where it was.
    """
    from flows.console import start_logging
    from flows.overrides import save_values
    from flows.params import load

    load(params, overrides)
    start_logging()
    logging.getLogger(__name__).info("starting Prefect (some 10 s where no server is running)")
    from flows.sweep import sweep as search
    from flows.sweep_table import show_sweep

    outcome = search(str(params), list(overrides), list(labels))
    show_sweep(outcome)
    if save:
        entries = outcome["winners"].items()
        save_values(params, [(("merge", "methods", label), entry) for label, entry in entries])


@main.command()
@_base
@_experts
@_method
@_set
@_out
@_device
@click.option(
    "--dtype",
    default="source",
    show_default=True,
    type=click.Choice(["source", "float32", "bfloat16", "float16"]),
    help="To store; computed in fp32 or better.",
)
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
@_memory
@_overwrite
def merge(
    base: str,
    experts: Sequence[str],
    method: str,
    overrides: Sequence[str],
    out: Path,
    memory: float | None,
    **choices: Any,
) -> None:
    """Merge experts into one model folder.

    SRC is a folder, a PEFT adapter folder, a .gguf file, hf://org/name@revision, package://name/path
    or an fsspec URL.
    """
    from flows.console import show_report, start_logging, tensor_progress
    from flows.overrides import in_bytes, parse_settings

    start_logging()
    settings = parse_settings(overrides)
    folders = _resolve(base, experts)
    from poemerge.merge import merge_checkpoints  # imports torch, while the inputs are hashed

    choices |= {"memory": in_bytes(memory)}
    with tensor_progress("merging") as progress:
        report = merge_checkpoints(
            folders.pop("base"), folders, out, method, progress=progress, **choices, **settings
        )
    show_report(report, out, samples=choices["samples"])


@main.command()
@_base
@_expert
@click.option("--rank", required=True, type=int, help="Of every matrix, 1 or more.")
@_out
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
@_device
@_overwrite
def extract(base: str, expert: str, rank: int, out: Path, **choices: Any) -> None:
    """Make the best low-rank adapter of a full fine-tune.

    The result is a PEFT adapter, and an expert for `poemerge merge`. Biases of layers in factors
    are dropped with a warning, since plain LoRA cannot hold them.
    """
    from flows.console import show_extraction, start_logging, tensor_progress
    from poemerge.extract import extract_adapter

    start_logging()
    folders = _resolve(base, [expert])
    source = folders.pop("base")
    (tuned,) = folders.values()
    with tensor_progress("extracting") as progress:
        report = extract_adapter(source, tuned, out, rank, progress=progress, **choices)
    show_extraction(report, out)


@main.command()
@_base
@_experts
@_method
@_set
@_device
@_memory
def check(
    base: str,
    experts: Sequence[str],
    method: str,
    overrides: Sequence[str],
    device: str,
    memory: float | None,
) -> None:
    """Say what a merge would do: rules, peak memory, time; exit 1 if it cannot be done."""
    from flows.console import show_plan, start_logging
    from flows.overrides import in_bytes, parse_settings
    from poemerge.device import pick_device
    from poemerge.merging.cost import estimate_seconds
    from poemerge.merging.plan import plan_merge

    start_logging()
    where = pick_device(device)
    folders = _resolve(base, experts)
    with plan_merge(folders.pop("base"), folders, method, parse_settings(overrides)) as plan:
        show_plan(plan, where, in_bytes(memory), estimate_seconds(plan, where))


@main.command()
def methods() -> None:
    """List every method with its settings, defaults and source."""
    from flows.console import show_methods
    from poemerge.methods import METHODS

    show_methods(METHODS)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="SRC", help="Of a merged model: what it was merged into.")
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="[NAME=]SRC",
    help="Of a merged model: what was merged, in that order; repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make. [DIR/report of a run, DIR-report of a model]",
)
@click.option(
    "--detail",
    default=4,
    show_default=True,
    type=click.IntRange(min=0),
    help="How many merges to look into, best first.",
)
@click.option(
    "--side",
    default="output",
    show_default=True,
    type=click.Choice(["output", "input"]),
    help="Of the residuals.",
)
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap and of samples.")
@_device
@click.option("--open", "show", is_flag=True, help="Show the page in the browser.")
def report(
    folder: Path,
    base: str | None,
    experts: Sequence[str],
    out: Path | None,
    *,
    show: bool,
    **choices: Any,
) -> None:
    """Write one HTML page with all there is to see of a run, or of one merged model.

    DIR is what a run wrote (artifacts, .poemerge/runs/...), or a merged model. Of a model alone the
    page has rules, norms and certificates; residuals and uncertainty need its base and experts.
    """
    from flows.console import start_logging
    from tasks.report import PAGE, write_report
    from tasks.report.sources import Sources

    start_logging()
    if bool(base) != bool(experts):
        raise click.UsageError("--base and --expert go together.")
    given = _resolve(base, experts) if base else {}
    sources = Sources.find(folder, given.pop("base", None), given)
    out = out or sources.default_out(folder)
    made = write_report(sources, out, **choices)
    click.echo(f"{out / PAGE}{'' if made else ' was up to date'}")
    if show:
        click.launch(str(out / PAGE))


@main.command()
@click.argument("ref", metavar="REF")
@click.option("--json", "as_json", is_flag=True, help="The record itself.")
def lineage(ref: str, *, as_json: bool) -> None:
    """Show what made a model: sources, hashes, settings, code, packages.

    REF is a folder, models:/NAME@ALIAS or models:/NAME/VERSION.
    """
    from flows.console import show_lineage
    from poemerge.lineage import Lineage

    if ref.startswith("models:/"):
        from tasks.register.registry import registered_lineage

        record: Lineage | None = registered_lineage(ref)
    else:
        record = Lineage.find(Path(ref))
    if record is None:
        raise SettingError(f"{ref} has no lineage.json; give a folder that poemerge made.")
    show_lineage(ref, record, as_json=as_json)


def _resolve(base: str, experts: Sequence[str]) -> dict[str, Path]:
    """Name → folder that the core can read, the base first; what is no such folder is fetched."""
    from poemerge.lineage import hash_ahead
    from poemerge.names import unused_name

    folders = {"base": _local(base)}
    for text in experts:
        name, equals, source = text.partition("=")
        folder = _local(source if equals else text)
        folders[unused_name(name if equals else Path(text.split("@")[0]).name, folders)] = folder
    hash_ahead(folders.values())
    return folders


def _local(source: str) -> Path:
    """`source` itself if the core can read it, else a copy; fetching imports much."""
    from poemerge.layout import is_ready

    if is_ready(Path(source)):
        return Path(source)
    from tasks.fetch import resolve_local

    return resolve_local(source, Path(os.environ.get(CACHE, Path.home() / ".cache" / "poemerge")))


if __name__ == "__main__":
    main()
