"""Commands on the library of experts: add, list, remove."""

from collections.abc import Sequence
from pathlib import Path

import click

from flows.cli.options import (
    local_folder,
    params_option,
    parse_tags,
    source_name,
    tags_option,
)


@click.group()
def experts() -> None:
    """The library of experts, kept in MLflow and DVC (docs/library.md)."""


@experts.command()
@click.argument("source", metavar="SRC")
@click.option("--task", required=True, metavar="NAME", help="What it was trained for.")
@click.option("--name", metavar="NAME", help="Of the registered model. [the last part of SRC]")
@tags_option("By which it is found; repeatable.")
@click.option("--base", metavar="SRC", help="What it was fine-tuned from. [fetch.base of --params]")
@params_option
@click.option("--no-score", "unscored", is_flag=True, help="Do not score it on its own task.")
@click.option("--push", is_flag=True, help="Bring its bytes to the DVC remote too.")
def add(
    source: str,
    task: str,
    name: str | None,
    tags: Sequence[str],
    base: str | None,
    params: Path,
    *,
    unscored: bool,
    push: bool,
) -> None:
    """Add an expert: check that it is one of its base, score it on its own task, register it.

    SRC is what `poemerge merge` takes. Bytes that are there are not added again; other bytes under
    the same name are a new version.
    """
    from flows.console import start_logging
    from flows.params import load

    start_logging()
    settings = None if unscored and base else load(params)
    if settings is not None:
        base = base or settings.fetch.base.source
    folder = local_folder(str(base))
    from flows import library, sharing  # imports torch
    from tasks.dvc_store.remote import check_remote

    if push:
        check_remote()
    expert, new = library.add(
        source,
        str(base),
        folder,
        name=name or source_name(source),
        task=task,
        tags=parse_tags(tags),
        scoring=None if unscored or settings is None else settings.evaluate,
    )
    if push:
        sharing.share_expert(expert)
    score = "" if expert.score is None else f", {expert.score:.1%} on its own task"
    click.echo(f"{expert.uri}{'' if new else ' was there already'}{score}")


@experts.command("list")
@tags_option("Only those that have it; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def list_experts(tags: Sequence[str], *, as_json: bool) -> None:
    """List the newest version of every expert."""
    from flows.library_table import show_experts
    from tasks import library

    wanted = parse_tags(tags)
    found = [expert for expert in library.experts() if expert.matches(wanted)]
    show_experts(found, as_json=as_json)


@experts.command()
@click.argument("ref", metavar="NAME[/VERSION]")
@click.option("--force", is_flag=True, help="Even if registered merges were made from it.")
def remove(ref: str, *, force: bool) -> None:
    """Remove an expert, or one version of it, from MLflow.

    Its bytes stay in DVC until `dvc gc`.
    """
    from tasks import library

    name, _, number = ref.removeprefix("models:/").partition("/")
    for removed in library.remove(name, number or None, force=force):
        click.echo(f"{removed} was removed; its bytes stay in DVC until `dvc gc`")
