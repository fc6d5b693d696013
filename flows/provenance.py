"""Lineage, verification and reproduction as commands and gates ask for them: in this project."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.places import ARTIFACTS, RUNS, cache
from poemerge.errors import SettingError, SourceError
from poemerge.progress import Progress, silent
from tasks.fetch import DTYPE, resolve_local
from tasks.fetch.package import locate
from tasks.provenance.history import Made
from tasks.provenance.history import history as trace
from tasks.provenance.reproduce import Reproduction
from tasks.provenance.reproduce import reproduce as repeat
from tasks.provenance.search import Reach
from tasks.provenance.verify import Verification
from tasks.provenance.verify import verify as check

PACKAGE = "package://"


def history(ref: str) -> Made:
    """What made a model, and what has become of it; see tasks.provenance.history."""
    return trace(ref, (ARTIFACTS, RUNS))


def verify(ref: str, sources: Sequence[str] = (), *, remote: bool = False) -> Verification:
    """Hash everything again that can be reached from a model.

    Args:
        ref: a folder, `models:/...` or `dvc://...`.
        sources: `NAME=DIR` for sources that lie elsewhere than their records say.
        remote: True if object storage that a record names may be asked.

    Raises:
        PoemergeError: there is no such model, or its record cannot be had.
    """
    return check(ref, _reach(sources, remote=remote))


def reproduce(
    ref: str, out: Path, sources: Sequence[str] = (), progress: Progress = silent
) -> Reproduction:
    """Merge again with the recorded sources and settings, and compare byte by byte.

    Args:
        ref: a merged model.
        out: folder to make.
        sources: as in `verify`.
        progress: called with (tensors done, tensors in all).

    Raises:
        PoemergeError: it is no merge, or a source cannot be had as it was.
    """
    return repeat(ref, out, _reach(sources, remote=True), _fetch, progress)


def _reach(sources: Sequence[str], *, remote: bool) -> Reach:
    given = {}
    for text in sources:
        name, equals, folder = text.partition("=")
        if not equals or not Path(folder).exists():
            raise SettingError(f"--source {text} names no place; write NAME=DIR.")
        given[name] = Path(folder)
    return Reach(_locate, (ARTIFACTS, RUNS, cache()), given, remote)


def _locate(address: str) -> Path | None:
    """Where an address leads on this machine; None if elsewhere."""
    if address.startswith(PACKAGE):
        try:
            return locate(address.removeprefix(PACKAGE))
        except SourceError:  # it is not installed
            return None
    return None if "://" in address else Path(address)


def _fetch(address: str, params: Mapping[str, Any]) -> Path:
    return resolve_local(address, cache(), dtype=params.get("dtype", DTYPE))
