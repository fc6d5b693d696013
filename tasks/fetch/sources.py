"""From what the user wrote to an origin: the one place where the kind of a source is decided."""

import re
from pathlib import Path

from poemerge.errors import SourceError
from poemerge.redaction import carries_secret
from poemerge.remote import places
from tasks.fetch.dvc import open_content
from tasks.fetch.gguf import open_file
from tasks.fetch.hub import open_repository
from tasks.fetch.local import open_folder
from tasks.fetch.origin import Origin
from tasks.fetch.package import locate
from tasks.fetch.registered import open_version
from tasks.fetch.storage import open_storage

SCHEME = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+):/{1,2}(?P<address>.*)")
KINDS = (
    "a folder, a .gguf file, hf://org/name@revision, models:/name@alias, models:/name/version, "
    "dvc://path, package://name/path or s3://bucket/folder"
)


def open_source(source: str, dtype: str) -> Origin:
    """Resolve `source` to immutable bytes.

    Args:
        source: a folder, a .gguf file, `hf://org/name@revision`, `models:/name@alias`,
            `models:/name/version`, `dvc://path`, `package://name/path`, or the URL of a folder in
            an object storage.
        dtype: in which dequantised weights are stored.

    Raises:
        SourceError: the source is of no known kind, does not exist, or is refused.
    """
    if carries_secret(source):
        raise SourceError(
            f"{source} holds a password, a token or a query, and sources are recorded with every "
            "model; leave it out, and say who you are in the environment (HF_TOKEN, say)."
        )
    place, parts = places.locate(source), SCHEME.fullmatch(source)
    if isinstance(place, str):
        return open_storage(place)
    if parts is None or parts["scheme"] == places.HERE:
        return open_path(place, dtype)
    match parts["scheme"]:
        case "hf":
            return open_repository(parts["address"])
        case "package":
            return open_path(locate(parts["address"]), dtype)
        case "models":
            return open_version(parts["address"])
        case "dvc":
            return open_content(parts["address"])
        case scheme:
            raise SourceError(f"A {scheme}: source cannot be fetched; give {KINDS}.")


def open_path(path: Path, dtype: str) -> Origin:
    """Resolve a folder or a .gguf file on this machine.

    Raises:
        SourceError: there is no such folder or file.
    """
    if path.is_dir():
        return open_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return open_file(path, dtype)
    problem = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise SourceError(f"{path} {problem}; give {KINDS}.")
