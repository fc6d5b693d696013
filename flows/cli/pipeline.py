"""Commands on a params.yaml: run, sweep, report."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.cli.options import device_option, params_option, resolve_here, set_option

if TYPE_CHECKING:
    from flows.changes import Standing


@click.command()
@params_option
@set_option
@click.option("--save", is_flag=True, help="Write the --set values into the parameter file first.")
@click.option("--force", is_flag=True, help="Look at every stage, though nothing moved.")
@click.option("--push", is_flag=True, help="Then push what was made to the DVC remote.")
def run(params: Path, overrides: Sequence[str], *, save: bool, force: bool, push: bool) -> None:
    """Run the whole pipeline: fetch, task_vectors, merge, evaluate, register, report.

    Where sources, parameters, code and data are those of the last complete run, it ends at once;
    else what is up to date is not done again. With --set, params.yaml and dvc.lock stay as they are
    unless --save is given.
    """
    from flows.bars import bars
    from flows.console import start_logging
    from flows.decision_table import show_promotion
    from flows.overrides import save_overrides
    from flows.params import load
    from tasks.fetch import resolved_once

    load(params, overrides)
    if save:
        save_overrides(params, overrides)
        overrides = ()
    start_logging()
    with bars(), resolved_once():
        outcome = _run(params, overrides, force=force, push=push)
    if not isinstance(outcome, dict):
        click.echo(str(outcome))
        return
    from flows.outcome_table import show_outcome  # imports Prefect, which is there by now

    show_outcome(outcome)
    if outcome.get("promotion"):
        show_promotion(outcome["promotion"])


def _run(
    params: Path, overrides: Sequence[str], *, force: bool, push: bool
) -> "dict[str, Any] | Standing":
    """What came of the pipeline, or that there was nothing to do."""
    from flows.changes import look
    from flows.selection import find_places

    if not (force or push):
        standing = look(find_places(params, overrides))
        if standing.is_current:
            return standing
    logging.getLogger(__name__).info("starting Prefect (some 10 s where no server is running)")
    from flows.pipeline import pipeline
    from flows.prefect_server import LostError, asked

    try:
        with asked():
            return pipeline(str(params), list(overrides), force=force, push=push)
    except LostError as error:  # it is told of the work, and does none
        standing = look(find_places(params, overrides))
        if force or push or not standing.is_current:
            raise
        logging.getLogger(__name__).warning("%s", error)
        return standing


@click.command()
@params_option
@set_option
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

    loaded = load(params, overrides)
    start_logging()
    from flows.prefect_server import asked
    from flows.sweep import section_of
    from flows.sweep import sweep as search
    from flows.sweep_table import show_sweep

    section_of(loaded, str(params), labels)
    logging.getLogger(__name__).info("starting Prefect (some 10 s where no server is running)")

    with asked():
        outcome = search(str(params), list(overrides), list(labels))
    show_sweep(outcome)
    if save:
        entries = outcome["winners"].items()
        save_values(params, [(("merge", "methods", label), entry) for label, entry in entries])


@click.command()
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
    default="input",
    show_default=True,
    type=click.Choice(["input", "output"]),
    help="Of the residuals.",
)
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap and of samples.")
@device_option
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
    from flows.turns import turn
    from tasks.report import PAGE, write_report
    from tasks.report.sources import Sources

    start_logging()
    if bool(base) != bool(experts):
        raise click.UsageError("--base and --expert go together.")
    given = resolve_here(base, experts) if base else {}
    sources = Sources.find(folder, given.pop("base", None), given)
    out = out or sources.default_out(folder)
    with turn([choices["device"]]):
        made = write_report(sources, out, **choices)
    click.echo(f"{out / PAGE}{'' if made else ' was up to date'}")
    if show:
        click.launch(str(out / PAGE))
