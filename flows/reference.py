"""docs/reference.md, from the code: `python -m flows.reference` writes it, a test compares it."""

import json
from pathlib import Path

import click

from flows.cli import main
from poemerge.method import Method
from poemerge.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
WIDTH = 96

HEAD = """\
# Reference

Written by `python -m flows.reference` from the code. The parameters of a run are explained in
[params.yaml](../params.yaml) itself, each beside its value.

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
    rows = [
        f"| `{name}` | `{json.dumps(default)}` | {meaning.replace('|', 'or')} |"
        for name, default, meaning in method.settings.describe()
    ]
    table = "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])
    return f"### {method.name}\n\n{method.summary}\n\nSource: {method.source}.\n\n{table}\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
