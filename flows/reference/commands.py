"""The page of the command line: every command, its arguments and options, as click has them."""

import inspect
from collections.abc import Iterator

import click

from flows.cli import INTERRUPTED, REFUSED, main
from flows.reference.markdown import code, prose, table

WIDTH = 96
HEAD = f"""\
# Commands

Every command has `--help`, which says the same. Exit codes: 0 done; {REFUSED} refused, with one
sentence on what is wrong, where, and what to do; 2 the command line is wrong; {INTERRUPTED}
interrupted, and the same command goes on.
"""


def page() -> str:
    """The page: an overview, then each command."""
    found = list(_commands(main, click.Context(main, info_name="poemerge")))
    rows = [(_link(context), prose(context.command.get_short_help_str(WIDTH))) for context in found]
    return "\n".join([HEAD, table(("command", "does"), rows), *map(_entry, found)])


def _commands(group: click.Group, context: click.Context) -> Iterator[click.Context]:
    """Each command below a group, and those below it where it is a group itself."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        own = click.Context(command, parent=context, info_name=name, terminal_width=WIDTH)
        yield own
        if isinstance(command, click.Group):
            yield from _commands(command, own)


def _link(context: click.Context) -> str:
    return f"[{code(context.command_path)}](#{context.command_path.replace(' ', '-')})"


def _entry(context: click.Context) -> str:
    command = context.command
    usage = command.get_usage(context).removeprefix("Usage: ")
    shown = inspect.cleandoc(command.help or "").partition("\f")[0]
    text = "\n\n".join(map(_paragraph, shown.split("\n\n")))
    rows = [row for parameter in command.params if (row := _row(parameter, context))]
    options = table(("argument or option", "meaning"), rows)
    return f"## {context.command_path}\n\n{_block(usage)}\n\n{text}\n\n{options}"


def _paragraph(text: str) -> str:
    """Sentences, or lines that are to be shown as they are: click marks these by a backspace."""
    return _block(text.removeprefix("\b\n")) if text.startswith("\b\n") else prose(text)


def _block(lines: str) -> str:
    return f"```text\n{lines}\n```"


def _row(parameter: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    """An option as its help has it; an argument, of which the command's help speaks."""
    if isinstance(parameter, click.Argument):
        many = ", one or more" if parameter.nargs != 1 else ""
        return code(parameter.make_metavar(context)), "required" * parameter.required + many
    record = parameter.get_help_record(context)
    return (code(record[0]), prose(record[1])) if record else None
