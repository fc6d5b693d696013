"""fetch: one source becomes a folder of safetensors, config and tokenizer, with its lineage."""

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from poemerge.errors import SourceError
from poemerge.hashing import digest, hash_files
from poemerge.layout import is_ready
from poemerge.lineage import Lineage, Source, package_versions, produce
from tasks.fetch.identity import STAGE, Base, identify, trained_on
from tasks.fetch.origin import OfflineError, Origin, UnreachableError
from tasks.fetch.sources import give_up, open_source, resolved_once

__all__ = [
    "Base",
    "OfflineError",
    "UnreachableError",
    "fetch",
    "fetched",
    "identify",
    "resolve",
    "resolve_local",
    "resolved_once",
    "trained_on",
]

DTYPE = "bfloat16"

logger = logging.getLogger(__name__)


def is_network_fault(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """True if the run failed for a reason that may pass by itself; all else fails at once."""
    return isinstance(state.data, UnreachableError) and not isinstance(state.data, OfflineError)


@task(
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=2),
    retry_condition_fn=is_network_fault,
)
def fetch(
    name: str, source: str, out: str | Path, *, sha256: str | None = None, dtype: str = DTYPE
) -> bool:
    """Make the folder `out` from `source`, unless it is up to date.

    Args:
        name: the role it plays: `base`, or an expert's name.
        source: a folder, a .gguf file, `hf://org/name@revision`, `models:/name@alias`,
            `models:/name/version`, `dvc://path`, `package://name/path`, or the URL of a folder in
            an object storage, such as `s3://bucket/folder`; a relative path is taken from the
            current directory.
        out: the folder to make; replaced only once the new one is complete.
        sha256: what the source must have: the hash of a single file; of a folder, the digest of its
            {file: hash} mapping, which is one of tags in an object storage (the message on a
            mismatch says what was found).
        dtype: in which weights dequantised from GGUF are stored; others keep theirs.

    Returns:
        True if the folder was made, False if it was up to date.

    Raises:
        SourceError: the source is missing, refused, or not the expected one; `out` stays as it was.
        UnreachableError: the network failed, and `out` is no intact copy of the same source.
    """
    out = Path(out)
    try:
        origin = open_source(source, dtype)
    except UnreachableError as error:
        if not _is_intact_copy(out, source, sha256):
            raise
        logger.warning("%s was kept, though nobody could say whether it is current: %s", out, error)
        return False
    _check(source, origin, out, sha256)
    try:
        return produce(out, _record(name, source, origin), origin.write)
    finally:
        give_up(source)


def resolve(source: str, dtype: str = DTYPE, copy: Path | None = None) -> str:
    """The immutable revision that a source means now; nothing is downloaded or written.

    Args:
        source: as for `fetch`.
        dtype: as for `fetch`.
        copy: the folder that was fetched from it before, if it was. Where the network fails, its
            revision is taken, as `fetch` would keep it.

    Returns:
        A commit, a version, or a hash of the content.

    Raises:
        SourceError: the source is missing or refused.
        UnreachableError: the network failed, and `copy` is no intact copy of the same source.
    """
    try:
        return open_source(source, dtype).revision
    except UnreachableError as error:
        if copy is None or not _is_intact_copy(copy, source, None):
            raise
        logger.warning("%s is taken as current, though nobody could say so: %s", copy, error)
        return fetched(copy)


def fetched(out: Path) -> str:
    """The revision of its source that the folder `out` was made from.

    Raises:
        SourceError: `fetch` did not make it.
    """
    record = Lineage.find(out)
    if record is None or record.stage != STAGE:
        raise SourceError(f"{out} was not made by fetch; run fetch again.")
    return record.revision


def resolve_local(source: str, cache: Path, *, dtype: str = DTYPE) -> Path:
    """A folder that the core can read: `source` itself if it is one, else a copy in `cache`.

    Args:
        source: as for `fetch`.
        cache: where copies are kept, each in a folder named by a digest of the source.
        dtype: in which weights dequantised from GGUF are stored.

    Raises:
        SourceError: as for `fetch`.
    """
    if is_ready(Path(source)):
        return Path(source)
    out = cache / digest([source, dtype])[:16]
    fetch.fn("source", source, out, dtype=dtype)
    return out


def _record(name: str, source: str, origin: Origin) -> Lineage:
    tools = {tool: metadata.version(tool) for tool in origin.tools}
    read = Source(name, origin.files, source, origin.revision, origin.parent)
    return Lineage(
        STAGE,
        origin.settings,
        inputs=(read,),
        uri=source,
        revision=origin.revision,
        packages=dict(package_versions()) | tools,
    )


def _check(source: str, origin: Origin, out: Path, sha256: str | None) -> None:
    if Path(source).resolve() == out.resolve():
        raise SourceError(f"{source} cannot be fetched onto itself; give another output folder.")
    found = origin.sha256
    if sha256 is not None and sha256 != found:
        raise SourceError(
            f"{source} has sha256 {found} where {sha256} is expected; correct the number, or get "
            "the right file."
        )


def _is_intact_copy(out: Path, source: str, sha256: str | None) -> bool:
    record = Lineage.find(out)
    return (
        record is not None
        and (record.stage, record.uri) == (STAGE, source)
        and any(sha256 in {None, read.digest} for read in record.inputs)
        and dict(record.outputs) == hash_files(out)
    )
