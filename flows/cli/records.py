"""Commands that tell: methods, lineage, verify, reproduce, sign."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

REF = "REF is a folder, models:/NAME@ALIAS, models:/NAME/VERSION or dvc://PATH/MD5.dir."

sources_option = click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=DIR",
    help="Where a source lies, if not where its record says; repeatable.",
)
signature_option = click.option(
    "--signature", type=click.Path(path_type=Path), help="File of the signature. [DIR.sig]"
)


@click.command()
def methods() -> None:
    """List every method with its settings, defaults and source."""
    from flows.console import show_methods
    from poemerge.methods import METHODS

    show_methods(METHODS)


@click.command(epilog=REF)
@click.argument("refs", metavar="REF [REF]", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One document with all of it.")
@click.option("--diff", is_flag=True, help="Of two: what differs between them.")
def lineage(refs: Sequence[str], *, as_json: bool, diff: bool) -> None:
    """Show what made a model, down to its sources, and what has become of it.

    Hashes, settings, code, packages and device; the data and scores of its evaluation; its versions
    and their aliases.
    """
    if len(refs) != 1 + diff:
        raise click.UsageError("Give one REF, or two with --diff.")
    from dataclasses import asdict

    from flows.lineage_tree import show_differences, show_history
    from flows.provenance import history
    from tasks.provenance.difference import differences

    made = [history(ref) for ref in refs]
    if diff:
        found = differences(*made)
        if as_json:
            click.echo(json.dumps([asdict(each) for each in found], indent=2))
        else:
            show_differences(refs, found)
    elif as_json:
        click.echo(json.dumps({"ref": refs[0], **made[0].as_json()}, indent=2))
    else:
        show_history(refs[0], made[0])


@click.command(epilog=REF)
@click.argument("ref", metavar="REF")
@sources_option
@click.option("--remote", is_flag=True, help="Ask object storage for its tags of sources there.")
@click.option("--public-key", type=click.Path(path_type=Path), help="Check the signature too.")
@signature_option
def verify(
    ref: str,
    sources: Sequence[str],
    *,
    remote: bool,
    public_key: Path | None,
    signature: Path | None,
) -> None:
    """Hash everything again that a model is and was made from; exit 1 if it does not hold.

    Every file is intact, changed, or missing: not to be had where its record says. A source that is
    missing is no fault of the model.
    """
    from flows.console import start_logging, waiting
    from flows.lineage_tree import show_verification
    from flows.provenance import verify as check

    start_logging()
    if signature and not public_key:
        raise click.UsageError("--signature needs --public-key.")
    if public_key:
        from tasks.provenance.sign import check_signature, signature_of

        folder = Path(ref)
        check_signature(folder, public_key, signature or signature_of(folder))
        click.echo(f"{ref}: every file is as it was signed")
    with waiting("hashing"):
        found = check(ref, sources, remote=remote)
    show_verification(found)
    if found.problems:
        sys.exit(1)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private, EC, in PEM.")
@signature_option
def sign(folder: Path, key: Path, signature: Path | None) -> None:
    """Sign every file of a model folder, with OpenSSF model-signing.

    `poemerge verify DIR --public-key PUB.pem` checks it, and so does `model_signing verify key`.
    """
    from tasks.provenance.sign import sign as write_signature
    from tasks.provenance.sign import signature_of

    signature = signature or signature_of(folder)
    write_signature(folder, key, signature)
    click.echo(f"{folder}: signed, {signature}")


@click.command(epilog=REF)
@click.argument("ref", metavar="REF")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to make, and to keep. [a temporary one]"
)
@sources_option
def reproduce(ref: str, out: Path | None, sources: Sequence[str]) -> None:
    """Merge again from the recorded sources and settings, and compare; exit 1 if it differs."""
    from flows.console import start_logging, tensor_progress
    from flows.lineage_tree import show_reproduction
    from flows.provenance import reproduce as repeat

    start_logging()
    with TemporaryDirectory() as scratch:
        with tensor_progress("merging again") as progress:
            found = repeat(ref, out or Path(scratch, "merged"), sources, progress)
        show_reproduction(ref, found, kept=out is not None)
    if found.differing:
        sys.exit(1)
