"""From what the user wrote to an origin: the one place where the kind of a source is decided."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
ELSEWHERE = {"hf": open_repository, "models": open_version, "dvc": open_content}
KINDS = (
    "a folder, a .gguf file, hf://org/name@revision, models:/name@alias, models:/name/version, "
    "dvc://path, package://name/path or s3://bucket/folder"
)
# What was asked for elsewhere so far, where it is to have one meaning: source → what that is.
_resolved: ContextVar[dict[str, Origin] | None] = ContextVar("resolved", default=None)


@contextmanager
def resolved_once() -> Iterator[None]:
    """Within the block, a source that lies elsewhere is asked for once, and keeps that meaning.

    What lies on this machine is looked at each time: it may change while a run waits for its turn,
    and a file that did not change is not read again.
    """
    if _resolved.get() is not None:
        yield
        return
    token = _resolved.set({})
    try:
        yield
    finally:
        _resolved.reset(token)


def give_up(source: str) -> None:
    """Forget what a source means, with the bytes that may have been downloaded to say so."""
    (_resolved.get() or {}).pop(source, None)


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
        case "package":
            return open_path(locate(parts["address"]), dtype)
        case scheme if scheme in ELSEWHERE:
            return _once(source, lambda: ELSEWHERE[scheme](parts["address"]))
        case scheme:
            raise SourceError(f"A {scheme}: source cannot be fetched; give {KINDS}.")


def _once(source: str, ask: Callable[[], Origin]) -> Origin:
    known = _resolved.get()
    if known is None:
        return ask()
    if source not in known:
        known[source] = ask()
    return known[source]


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
