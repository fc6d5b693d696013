"""`models:/NAME@ALIAS` and `models:/NAME/VERSION`: a version that MLflow has, whoever made it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

from poemerge.errors import SourceError
from poemerge.hashing import digest
from poemerge.layout import RECORD
from tasks import versions
from tasks.dvc_store import SCHEME, is_held
from tasks.fetch.dvc import open_content
from tasks.fetch.growth import growing
from tasks.fetch.layout import find_room, flat
from tasks.fetch.local import open_folder
from tasks.fetch.origin import Origin, UnreachableError
from tasks.tracking import connected, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def open_version(address: str) -> Origin:
    """Resolve `NAME@ALIAS` or `NAME/VERSION` to a version, and hash its bytes.

    What lies in DVC is read from its cache. What lies in MLflow is downloaded to be hashed: a model
    that poemerge did not make may be there, in the layout of `mlflow.transformers` too.

    Raises:
        SourceError: there is no such alias or version, or its bytes are gone or are not those that
            were registered.
        UnreachableError: the MLflow server does not answer.
    """
    ref = f"{versions.SCHEME}{address}"
    with _reached() as client:
        version = versions.resolve(client, ref)
        place = client.get_model_version_download_uri(version.name, version.version)
        where = versions.uri(version)
        if is_held(place):
            origin = open_content(place.removeprefix(f"{SCHEME}:").strip("/"))
        else:
            origin = _download(where, place)
    _check(where, version, origin)
    revision = f"{where}@{origin.sha256}"
    return replace(origin, revision=revision, settings={"revision": revision})


@contextmanager
def _reached() -> Iterator[Any]:
    """A client of MLflow; that its server does not answer may pass by itself."""
    try:
        with connected() as client:
            yield client
    except SourceError as error:
        if _is_network_fault(error.__cause__):
            message = f"MLflow at {shown_uri()} does not answer; see that its server runs."
            raise UnreachableError(message) from error
        raise


def _download(where: str, place: str) -> Origin:
    """Fetch everything into a folder that goes when nobody can write from it any more."""
    import mlflow  # noqa: PLC0415 - 1 s
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="poemerge-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        try:
            with growing(scratch, where, _size(place)):
                got = mlflow.artifacts.download_artifacts(
                    place, dst_path=os.fspath(scratch / "got"), tracking_uri=tracking_uri()
                )
        except (MlflowException, OSError) as error:
            kind = UnreachableError if _is_network_fault(error) else SourceError
            reason = " ".join(str(error).split())
            message = f"The bytes of {where} cannot be had ({reason}); register it anew."
            raise kind(message) from error
        origin = open_folder(_flatten(where, Path(got), scratch / "flat"))
        finalize(origin.write, stack.pop_all().close)
        return origin


def _size(place: str) -> int:
    """Bytes of all that MLflow has there."""
    from mlflow.store.artifact import artifact_repository_registry  # noqa: PLC0415 - 1 s

    def below(path: str | None) -> int:
        found = repository.list_artifacts(path)
        return sum(below(each.path) if each.is_dir else each.file_size or 0 for each in found)

    repository = artifact_repository_registry.get_artifact_repository(place, tracking_uri())
    return below(None)


def _is_network_fault(error: BaseException | None) -> bool:
    """True for an error of requests, which is an OSError of no number, or one of MLflow's after it.

    MLflow raises its own while it handles that of requests, and names no cause.
    """
    behind = error.__context__ if error else None
    return any(isinstance(each, OSError) and each.errno is None for each in (error, behind))


def _flatten(where: str, source: Path, folder: Path) -> Path:
    """The files that make up the model, and its record, side by side."""
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    folder.mkdir()
    held = {**flat(where, names), RECORD: find_room(names) + RECORD}
    for name, path in held.items():
        if path in names:
            (source / path).rename(folder / name)
    return folder


def _check(where: str, version: "ModelVersion", origin: Origin) -> None:
    """Compare the bytes with the record beside them, and the record with what was registered."""
    stated = version.tags.get(versions.DIGEST)
    if stated is None:
        return  # whoever made it said nothing of its bytes
    outputs = (origin.parent or {}).get("outputs", {})
    if digest(outputs) != stated or not origin.files.items() <= outputs.items():
        message = f"{where} holds other bytes than were registered; restore them, or register anew."
        raise SourceError(message)
