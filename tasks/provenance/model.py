"""A model by reference: a folder, a registered version, or what DVC holds; its record and files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from poemerge.errors import PoemergeError, SettingError, SourceError
from poemerge.hashing import digest
from poemerge.layout import RECORD
from poemerge.lineage import Lineage
from tasks.tracking import DATABASE, VARIABLE, connected, has_registry
from tasks.versions import DIGEST, LOADER, download, is_ref, resolve, uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

DVC = "dvc://"
REFS = "a folder that poemerge made, models:/NAME@ALIAS, models:/NAME/VERSION or dvc://PATH/MD5.dir"


@dataclass(frozen=True)
class Model:
    """What a reference means now.

    Attributes:
        ref: as it was given.
        where: the place that its bytes were looked for in.
        files: relative path → file, of those that are there.
        record: what made it.
        registered: the digest that MLflow has of its version; empty where it is no version.
        loader: likewise of the files beside the model's own.
    """

    ref: str
    where: str
    files: Mapping[str, Path]
    record: Lineage
    registered: str = ""
    loader: str = ""

    @property
    def digest(self) -> str:
        """One sha256 for all that was made; a version is found by it."""
        return digest(dict(self.record.outputs))


@contextmanager
def opened(ref: str) -> Iterator[Model]:
    """The model that `ref` means; its files may be temporary.

    Args:
        ref: see `REFS`.

    Raises:
        SettingError: a folder without a record.
        SourceError: there is no such version or content, or nothing of it can be had.
    """
    if is_ref(ref):
        if not has_registry():
            raise SourceError(f"{DATABASE} does not exist; run where it lies, or set {VARIABLE}.")
        with connected() as client:
            version = resolve(client, ref)
            with _versioned(client, ref, version) as model:
                yield model
    elif ref.startswith(DVC):
        files = _held(ref)
        yield Model(ref, ref, files, _record(ref, files))
    else:
        yield _folder(ref)


def _folder(ref: str) -> Model:
    folder = Path(ref)
    record = Lineage.find(folder)
    if record is None:
        raise SettingError(f"{ref} has no {RECORD}; give {REFS}.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return Model(ref, ref, {n: path for n, path in files.items() if path.is_file()}, record)


@contextmanager
def _versioned(client: Any, ref: str, version: "ModelVersion") -> Iterator[Model]:
    with TemporaryDirectory() as scratch:
        files = _bytes(client, version, Path(scratch))
        try:
            record = _record(ref, files)
        except SourceError:  # its run in MLflow has the record too
            record = _logged(client, version, Path(scratch))
        stated = [version.tags.get(tag, "") for tag in (DIGEST, LOADER)]
        yield Model(ref, version.source, files, record, *stated)


def _bytes(client: Any, version: "ModelVersion", scratch: Path) -> Mapping[str, Path]:
    """The files of a version: in DVC's cache, or downloaded; none where they cannot be had."""
    if version.source.startswith(DVC):
        return _held(version.source)
    place = client.get_model_version_download_uri(version.name, version.version)
    (scratch / "model").mkdir()
    try:
        return download(place, scratch / "model")
    except PoemergeError:
        return {}


def _held(address: str) -> Mapping[str, Path]:
    """What of a `dvc://` reference is in the cache, once the remote was asked for the rest."""
    from tasks.dvc_store.reference import Reference, contents, present  # noqa: PLC0415 - DVC

    reference, _ = Reference.parse(address)
    try:
        found = contents(reference)
    except SourceError:
        found = present(reference)
    return {name: blob.path for name, blob in found.items()}


def _record(ref: str, files: Mapping[str, Path]) -> Lineage:
    if RECORD not in files:
        raise SourceError(f"{ref} holds no {RECORD}; its bytes are gone, or poemerge made it not.")
    return Lineage.read(files[RECORD])


def _logged(client: Any, version: "ModelVersion", scratch: Path) -> Lineage:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - 1 s, and only once it is calm

    (scratch / "run").mkdir()
    try:
        client.download_artifacts(version.run_id, RECORD, str(scratch / "run"))
    except (MlflowException, OSError) as error:
        message = f"Neither the bytes of {uri(version)} nor its {RECORD} can be had ({error})."
        raise SourceError(f"{message} Make it again.") from error
    return Lineage.read(scratch / "run" / RECORD)
