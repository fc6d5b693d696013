"""Options that commands share, and the folders behind a SRC."""

from collections.abc import Sequence
from pathlib import Path

import click

params_option = click.option(
    "--params",
    default="params.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Parameter file.",
)
set_option = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Replace one value; repeatable."
)
base_option = click.option("--base", required=True, metavar="SRC", help="Checkpoint they share.")
experts_option = click.option(
    "--expert",
    "experts",
    required=True,
    multiple=True,
    metavar="[NAME=]SRC",
    help="Fine-tuned checkpoint or PEFT adapter; repeatable.",
)
method_option = click.option(
    "--method", default="cauchy_poe", show_default=True, help="See `poemerge methods`."
)
expert_option = click.option(
    "--expert", required=True, metavar="SRC", help="Full fine-tune of the base."
)
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to make."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace --out where it exists.")
memory_option = click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Keep the whole process within; slower where it is tight.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:i]",
    help="Where to solve.",
)


def resolve(base: str, experts: Sequence[str]) -> dict[str, Path]:
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
    from flows.places import cache
    from tasks.fetch import resolve_local

    return resolve_local(source, cache())
