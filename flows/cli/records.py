"""Commands that tell: methods, lineage."""

from pathlib import Path

import click

from poemerge.errors import SettingError


@click.command()
def methods() -> None:
    """List every method with its settings, defaults and source."""
    from flows.console import show_methods
    from poemerge.methods import METHODS

    show_methods(METHODS)


@click.command()
@click.argument("ref", metavar="REF")
@click.option("--json", "as_json", is_flag=True, help="The record itself.")
def lineage(ref: str, *, as_json: bool) -> None:
    """Show what made a model: sources, hashes, settings, code, packages.

    REF is a folder, models:/NAME@ALIAS or models:/NAME/VERSION.
    """
    from flows.console import show_lineage
    from poemerge.lineage import Lineage

    if ref.startswith("models:/"):
        from tasks.versions import registered_lineage

        record: Lineage | None = registered_lineage(ref)
    else:
        record = Lineage.find(Path(ref))
    if record is None:
        raise SettingError(f"{ref} has no lineage.json; give a folder that poemerge made.")
    show_lineage(ref, record, as_json=as_json)
