"""Options that commands share, and the folders behind a SRC."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from poemerge.errors import SettingError

NUMBERED = re.compile(r"models:/[^/]+/\d+|dvc://.+/[0-9a-f]{32}\.dir")  # which is no name

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
    multiple=True,
    metavar="[NAME=]SRC",
    help="Fine-tuned checkpoint or PEFT adapter; repeatable.",
)
select_option = click.option(
    "--select",
    "wanted",
    multiple=True,
    metavar="TAG=VALUE",
    help="Every expert of the library that has it; repeatable, then all of them.",
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
anywhere_option = click.option("--out", required=True, help="Folder to make, here or at a URL.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace --out where it exists.")
memory_option = click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Keep the whole process within; slower where it is tight.",
)
vocabulary_option = click.option(
    "--vocabulary",
    default="refuse",
    show_default=True,
    type=click.Choice(["refuse", "pad", "base"]),
    help="Where an expert's token rows do not fit: match them by token, or keep the base's.",
)
foreign_option = click.option(
    "--foreign",
    default="refuse",
    show_default=True,
    type=click.Choice(["refuse", "warn"]),
    help="Where an expert was not fine-tuned from the base.",
)
dtype_option = click.option(
    "--dtype",
    default="source",
    show_default=True,
    type=click.Choice(["source", "float32", "bfloat16", "float16"]),
    help="To store; computed in fp32 or better.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:i]",
    help="Where to solve.",
)


def tags_option(meaning: str) -> Callable[[Any], Any]:
    """`--tag`, for whatever it means there."""
    return click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help=meaning)


def parse_tags(texts: Sequence[str]) -> dict[str, str]:
    """Tags from `key=value` texts."""
    tags = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value:
            raise SettingError(f"{text!r} is no tag with a value; write key=value.")
        tags[key] = value
    return tags


def source_name(source: str) -> str:
    """What a source is called that nobody named: its last part, but for a version or a hash."""
    path = Path(source.partition("@")[0])
    return path.parent.name if NUMBERED.fullmatch(source) else path.name


def named(experts: Sequence[str]) -> dict[str, str]:
    """Name → SRC of experts that are given as `[NAME=]SRC`; none is called `base`."""
    from poemerge.names import unused_name

    sources = {"base": ""}
    for text in experts:
        name, equals, source = text.partition("=")
        source = source if equals else text
        if equals and name in sources:
            raise SettingError(f"Two sources are named {name!r}; give each expert its own name.")
        sources[unused_name(name if equals else source_name(source), sources)] = source
    del sources["base"]
    return sources


def resolve(
    base: str, experts: Sequence[str], wanted: Sequence[str] = (), *, hashed: bool = True
) -> dict[str, Path | str]:
    """Name → folder that the core can read, the base first; what is no such folder is fetched.

    One in an object storage stays there.

    Args:
        base: SRC.
        experts: `[NAME=]SRC` each.
        wanted: `tag=value` that experts of the library have, all of them.
        hashed: False where nobody will ask for the hashes of these folders.
    """
    from poemerge.hashing import hash_ahead

    folders = {name: readable(s) for name, s in _checked(base, experts, wanted).items()}
    if hashed:
        hash_ahead(folder for folder in folders.values() if isinstance(folder, Path))
    return folders


def resolve_here(base: str, experts: Sequence[str]) -> dict[str, Path]:
    """The same for what reads whole tensors more than once: all of it is fetched."""
    from poemerge.hashing import hash_ahead

    folders = {name: local_folder(source) for name, source in _checked(base, experts).items()}
    hash_ahead(folders.values())
    return folders


def _checked(base: str, experts: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """Name → SRC, the base first; experts of the library are of this base."""
    if not experts and not wanted:
        raise click.UsageError("Give --expert or --select, or both.")
    sources = {"base": base, **named(experts)}
    from flows.selection import check_bases, select

    check_bases(base, {name: source for name, source in sources.items() if name != "base"})
    if wanted:
        sources |= select(base, parse_tags(wanted), sources)
    return sources


def readable(source: str) -> Path | str:
    """`source` itself if the core can read it, here or elsewhere, else a copy."""
    from poemerge.remote.places import is_readable, locate

    place = locate(source)
    return place if is_readable(place) else local_folder(source)


def local_folder(source: str) -> Path:
    """`source` itself if the core can read it here, else a copy; fetching imports much."""
    from poemerge.layout import is_ready
    from poemerge.remote.places import locate

    place = locate(source)
    if isinstance(place, Path) and is_ready(place):
        return place
    from flows.bars import bars
    from flows.places import cache
    from tasks.fetch import resolve_local

    with bars():
        return resolve_local(source, cache())
