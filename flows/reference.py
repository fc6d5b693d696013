"""docs/reference.md, from the code: `python -m flows.reference` writes it, a test compares it."""

import json
import math
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from flows.cli import main
from poemerge.method import Method
from poemerge.methods import METHODS
from poemerge.settings import default_of

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
WIDTH = 96
BAR = "&#124;"  # a bar that ends no cell of a table

HEAD = """\
# Reference

Written by `python -m flows.reference` from the code. The parameters of a run are explained in
[params.yaml](../params.yaml) itself, each beside its value; the settings of the products of
experts in [family.md](family.md).

## Commands
"""


def reference() -> str:
    """The page: every command with its help, every method with its settings."""
    commands = [_command(name, command) for name, command in sorted(main.commands.items())]
    methods = [_method(method) for method in METHODS.values()]
    return "\n".join([HEAD, *commands, "## Methods\n", *methods]).rstrip() + "\n"


def _command(name: str, command: click.Command) -> str:
    whole = main.make_context("poemerge", [], resilient_parsing=True)
    context = click.Context(command, parent=whole, info_name=name, max_content_width=WIDTH)
    context.terminal_width = WIDTH
    return f"### poemerge {name}\n\n```\n{command.get_help(context)}\n```\n"


def _method(method: Method) -> str:
    rows = [_row(field) for field in fields(method.settings)]
    table = "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows])
    return f"### {method.name}\n\n{method.summary}\n\nSource: {method.source}.\n\n{table}\n"


def _row(field: Field[Any]) -> str:
    default = json.dumps(default_of(field), ensure_ascii=False)
    cells = (f"`{field.name}`", f"`{default}`", _values(field), field.metadata["meaning"])
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _values(field: Field[Any]) -> str:
    """What a setting takes: its words, its range, or that it is a mapping."""
    choices, words = field.metadata["choices"], field.metadata["words"]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices if choice)
    if isinstance(default_of(field), Mapping):
        return "a mapping"
    return ", ".join(
        [_range(field.metadata["low"], field.metadata["high"]), *map("`{}`".format, words)]
    )


def _range(low: float, high: float) -> str:
    if high < math.inf:
        return f"{low:g} to {high:g}"
    return f"≥ {low:g}" if low > -math.inf else "a number"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
