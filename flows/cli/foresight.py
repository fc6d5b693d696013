"""Commands that say what a merge would take: check here, plan anywhere."""

from collections.abc import Sequence
from typing import Any

import click

from flows.cli.options import (
    base_option,
    device_option,
    dtype_option,
    experts_option,
    foreign_option,
    memory_option,
    method_option,
    resolve,
    select_option,
    set_option,
    vocabulary_option,
)


@click.command()
@base_option
@experts_option
@select_option
@method_option
@set_option
@device_option
@dtype_option
@vocabulary_option
@foreign_option
@click.option("--deep", is_flag=True, help="Look at every value, not at some rows of each tensor.")
@memory_option
def check(
    base: str,
    experts: Sequence[str],
    wanted: Sequence[str],
    method: str,
    overrides: Sequence[str],
    device: str,
    memory: float | None,
    **terms: Any,
) -> None:
    """Say what a merge would do: rules, what does not fit, peak memory, time; exit 1 if it cannot.

    Headers are read, and a few rows of every tensor: a value that is not finite elsewhere shows
    with --deep, or in the merge.
    """
    from flows.console import show_plan, start_logging
    from flows.overrides import in_bytes, parse_settings
    from poemerge.device import pick_device
    from poemerge.merging.jobs import Schedule, jobs
    from poemerge.merging.plan import plan_merge
    from poemerge.merging.rates import Rates
    from poemerge.merging.terms import Terms

    start_logging()
    where, settings = pick_device(device), parse_settings(overrides)
    folders = resolve(base, experts, wanted, hashed=False)
    with plan_merge(folders.pop("base"), folders, method, settings, Terms(**terms)) as made:
        plan = made.fitted(where, in_bytes(memory))
        alone = Schedule.balanced(jobs(plan), Rates.measured(where), workers=1)
        show_plan(plan, where, in_bytes(memory), alone.seconds, deep=terms["deep"])


@click.command()
@click.option("--base", required=True, metavar="SRC", help="Checkpoint that they share.")
@click.option(
    "--expert", "experts", multiple=True, metavar="[NAME=]SRC", help="To merge; repeatable."
)
@click.option("--experts", "count", default=0, metavar="N", help="So many more, like the base.")
@click.option("--rank", type=click.IntRange(min=1), help="Those are LoRA of this rank. [full]")
@click.option(
    "--method",
    default="cauchy_poe",
    show_default=True,
    help="See `poemerge methods`; `all` compares them.",
)
@set_option
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1))
@device_option
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help="GB of a worker.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="KEY=N",
    help="Billions a second of a worker: bandwidth, hashing, memory (bytes), single, double "
    "(operations in fp32, fp64); repeatable. [measured here]",
)
@click.option("--storage", type=float, metavar="GB/S", help="Bandwidth that workers share.")
@click.option(
    "--overhead", default=0.0, show_default=True, help="Seconds of a job beside its work."
)
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def plan(
    base: str,
    experts: Sequence[str],
    count: int,
    rank: int | None,
    method: str,
    overrides: Sequence[str],
    device: str,
    rates: Sequence[str],
    storage: float | None,
    *,
    as_json: bool,
    **choices: Any,
) -> None:
    """Say what a merge would take on other machines, from headers or a config.json alone.

    SRC is a checkpoint or adapter folder, a config.json, or hf://org/name@revision or the URL of an
    object storage's folder, of which the headers alone are downloaded.
    """
    import json

    from flows.cli.options import named
    from flows.console import waiting
    from flows.overrides import parse_settings
    from flows.plan_table import show_comparison, show_outlook
    from flows.planning import GIGA, Outlook, Wanted, rates_of
    from poemerge.methods import METHODS

    sources = named(experts)
    if not sources and count < 1:
        raise click.UsageError("Give --expert or --experts, or both.")
    settings, title = parse_settings(overrides), f"of {len(sources) + count} experts"
    choices["storage"] = None if storage is None else storage * GIGA
    found = {}
    with waiting("planning"), Wanted(base, sources, count, rank).headers() as plan_of:
        known = rates_of(rates, device)
        for name in sorted(METHODS) if method == "all" else [method]:
            with plan_of(name, settings) as planned:
                found[name] = Outlook.of(planned, device, known, **choices)
    if as_json:
        told = {name: outlook.as_json() for name, outlook in found.items()}
        click.echo(json.dumps(told if method == "all" else told[method], indent=2))
    elif method == "all":
        show_comparison(found, f"every method, {title}")
    else:
        show_outlook(found[method], f"{method} {title}")
