"""What made these bytes: the record `lineage.json` inside every folder that poemerge makes.

The file is an in-toto statement with SLSA provenance (statement.py); a record of format 1, which
was the plain fields, is read as well. It holds no clock, no host name and no absolute path, so the
same work gives the same bytes.
It also decides what is up to date: a folder is current when its record names the same stage,
params, inputs and code, and its files still have the recorded hashes.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Self

from poemerge import documents
from poemerge.alone import alone
from poemerge.atomic import new_folder, write_json
from poemerge.errors import SourceError
from poemerge.hashing import check_text, digest, hash_files, sha256
from poemerge.layout import RECORD
from poemerge.remote import stand_ins
from poemerge.statement import read_statement, write_statement
from poemerge.version import VERSION

PACKAGES = ("torch", "safetensors", "numpy")


@cache
def core_code() -> Mapping[str, str]:
    """Version of poemerge and one sha256 over its sources: what a merge was computed by."""
    package = Path(__file__).parent
    files = {p.relative_to(package).as_posix(): sha256(p) for p in sorted(package.rglob("*.py"))}
    return {"poemerge": VERSION, "sha256": digest(files)}


@cache
def package_versions() -> tuple[tuple[str, str], ...]:
    """Versions of Python and of the packages that shape the merged bytes."""
    versions = tuple((name, metadata.version(name)) for name in PACKAGES)
    return (("python", platform.python_version()), *versions)


@dataclass(frozen=True)
class Source:
    """One input of a stage.

    Attributes:
        name: the role it plays (`base`, an expert's name, a task's name).
        files: relative path → sha256 of every file that was read; of one elsewhere, the tag that
            its storage gave it (`etag:...`).
        uri: where it came from, as the user wrote it; an absolute path is left out, for it speaks
            of one machine.
        revision: what the URI resolved to, immutable (a commit, a hash); empty if it has none.
        parent: the fields of the lineage record found inside the input itself, so that a chain can
            be followed.
    """

    name: str
    files: Mapping[str, str]
    uri: str = ""
    revision: str = ""
    parent: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, name: str, folder: Path) -> Self:
        """Hash `folder` and take over the record that it carries, if any.

        Raises:
            SourceError: a file cannot be read, or a text is far too large.
        """
        for path in folder.rglob("*.json"):
            check_text(path)
        record, files = Lineage.find(folder), hash_files(folder)
        if record is None:
            return cls(name, files, _address(folder))
        return cls(name, files, record.uri or _address(folder), record.revision, asdict(record))

    @classmethod
    def of_file(cls, name: str, path: Path) -> Self:
        """Hash one file.

        Raises:
            SourceError: it cannot be read.
        """
        try:
            return cls(name, {path.name: sha256(path)}, _address(path))
        except OSError as error:
            reason = error.strerror
            message = f"{path} ({name}) cannot be read ({reason}); mend it, or name another."
            raise SourceError(message) from error

    @property
    def digest(self) -> str:
        """One sha256 for all files: equal digests mean equal bytes under equal names."""
        return digest(dict(self.files))


def _address(path: Path) -> str:
    return stand_ins.url_of(path) or ("" if path.is_absolute() else path.as_posix())


@dataclass(frozen=True)
class Lineage:
    """The record of one folder: stage, params, inputs, code, packages, device, outputs.

    `code` is the version of poemerge, and `core_code()` for what the core computes: a changed core
    makes merges anew, and leaves what other libraries computed alone.
    """

    stage: str
    params: Mapping[str, Any]
    inputs: tuple[Source, ...] = ()
    uri: str = ""
    revision: str = ""
    device: str = "cpu"
    code: Mapping[str, str] = field(default_factory=lambda: {"poemerge": VERSION})
    packages: Mapping[str, str] = field(default_factory=lambda: dict(package_versions()))
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What decides whether the work must be done again: stage, params, inputs, code."""
        inputs = [(source.name, source.digest) for source in self.inputs]  # sums round by order
        return digest([self.stage, self.params, inputs, self.uri, self.code])

    def is_current(self, folder: Path) -> bool:
        """True if `folder` holds what this record would make, and its bytes are unchanged."""
        found = Lineage.find(folder)
        return (
            found is not None
            and found.key == self.key
            and dict(found.outputs) == hash_files(folder)
        )

    def write(self, folder: Path) -> None:
        """Hash what `folder` holds and write the record into it."""
        fields = asdict(self) | {"outputs": hash_files(folder)}
        write_json(folder / RECORD, write_statement(fields))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """The record that has these fields, as `asdict` gives them and a source's parent is kept.

        Raises:
            KeyError: it has no inputs; a TypeError, an AttributeError or a ValueError where it is
                no record.
        """
        known = {name: value for name, value in fields.items() if name != "format"}
        record = cls(**known | {"inputs": tuple(Source(**source) for source in fields["inputs"])})
        _check(record)
        return record

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """The record inside `folder`, or None where there is none.

        Raises:
            SourceError: the file is there but is no lineage record.
        """
        path = folder / RECORD
        return cls.read(path) if documents.is_there(path) else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file, whatever its name.

        Raises:
            SourceError: it is unreadable, or no lineage record.
        """
        try:
            raw = documents.read_json(path)
        except (OSError, ValueError) as error:
            message = f"{path} is unreadable ({error}); delete it to go on without it."
            raise SourceError(message) from error
        try:
            return cls.of(read_statement(raw) if "_type" in raw else raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"{path} is no lineage record ({error}); delete it to go on."
            raise SourceError(message) from error


def _check(record: Lineage) -> None:
    """See that fields hold what they are written with, those of the records in it too."""
    files = [record.outputs, *(source.files for source in record.inputs)]
    texts = [record.stage, record.uri, record.revision, record.device]
    texts += [text for s in record.inputs for text in (s.name, s.uri, s.revision)]
    for table in (record.code, record.packages, *files):
        texts += [text for pair in table.items() for text in pair]
    if not (isinstance(record.params, Mapping) and all(isinstance(text, str) for text in texts)):
        raise TypeError("a field is of another kind")
    json.dumps(record.params, allow_nan=False)  # or it could not be handed on
    for name in (name for table in files for name in table):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"{name} is outside of its folder")
    for source in record.inputs:
        if source.parent is not None:
            Lineage.of(source.parent)


def produce(out: Path, record: Lineage, work: Callable[[Path], None]) -> bool:
    """Do `work` in a fresh folder that becomes `out`, unless `out` is current already.

    Of two processes one waits, and then finds it current.

    Args:
        out: the folder to make.
        record: what would be made; written into the folder when the work is done.
        work: fills the folder that it is given.

    Returns:
        True if the work was done, False if `out` was up to date.
    """
    with alone(out):
        if record.is_current(out):
            return False
        with new_folder(out) as folder:
            work(folder)
            record.write(folder)
        return True
