"""References to folders in the DVC cache.

The path in a reference is for people, the hash decides: for a folder alone it is the one that
`dvc.lock` has for that output. A reference never changes its meaning, whatever stands at the path.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.fs import localfs
from dvc.logger import set_loggers_level
from dvc.repo import Repo
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.transfer import transfer
from dvc_data.hashfile.tree import Tree

from poemerge.errors import SettingError, SourceError
from poemerge.names import stays_inside
from tasks.dvc_store import SCHEME
from tasks.dvc_store.pulled import Pulled

ROOT_VARIABLE = "POEMERGE_DVC_ROOT"
OID = re.compile(r"[0-9a-f]{32}\.dir")
FILE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Reference:
    """A folder's content at one moment.

    Attributes:
        path: where it stood, relative to the DVC repository.
        oid: DVC's hash of the whole folder, `<md5>.dir`.
    """

    path: str
    oid: str

    @property
    def uri(self) -> str:
        """The reference as MLflow stores it and people read it."""
        return f"{SCHEME}://{quote(self.path)}/{self.oid}"

    @classmethod
    def parse(cls, uri: str) -> tuple[Self, str]:
        """Split a URI into the folder that it names and the path inside that folder.

        Raises:
            SourceError: the URI names no content.
        """
        parts = uri.removeprefix(f"{SCHEME}:").strip("/").split("/")
        for position, part in enumerate(parts):
            if OID.fullmatch(part):
                inside = "/".join(parts[position + 1 :])
                return cls(unquote("/".join(parts[:position])), part), inside
        message = f"{uri} names no content; write dvc://<path>/<md5>.dir, as dvc.lock has it."
        raise SourceError(message)


@dataclass(frozen=True)
class Blob:
    """One file in the DVC cache."""

    path: Path
    md5: str

    def copy(self, target: Path) -> None:
        """Copy the file to `target`, and check what arrived.

        Raises:
            SourceError: the cache holds other bytes than the reference asks for.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, target)
        if file_md5(os.fspath(target), localfs) != self.md5:
            target.unlink()
            message = (
                f"{self.path} in the DVC cache is damaged; delete it and make or pull it again."
            )
            raise SourceError(message)


@contextmanager
def repository() -> Iterator[Any]:
    """The DVC repository around POEMERGE_DVC_ROOT, or else around the working directory, silent.

    Raises:
        SettingError: there is none.
    """
    root = os.environ.get(ROOT_VARIABLE) or "."
    try:
        found = Repo(root)
    except NotDvcRepoError as error:
        place = Path(root).resolve()
        message = f"{place} is no DVC repository; run `dvc init` there, or set {ROOT_VARIABLE}."
        raise SettingError(message) from error
    with found as repo, set_loggers_level(logging.CRITICAL):  # no progress bars, no hints
        yield repo


def put(folder: Path, beside: Path | None = None) -> Reference:
    """Bring `folder` into the DVC cache, as `dvc commit` would, and leave dvc.lock alone.

    Args:
        folder: inside the DVC repository.
        beside: a folder anywhere, whose files the reference has as if they lay in `folder`.

    Raises:
        SettingError: there is no DVC repository.
        SourceError: the folder lies outside it, or the cache refused a file.
    """
    with repository() as repo:
        root, place = Path(repo.root_dir).resolve(), folder.resolve()
        if not place.is_relative_to(root):
            message = f"{place} lies outside the DVC repository {root}; move it inside."
            raise SourceError(message)
        tree = Tree()
        for part in (place, beside) if beside else (place,):
            for key, meta, info in _add(repo, part):
                tree.add(key, meta, info)
        tree.digest()
        repo.cache.local.add(tree.path, tree.fs, tree.oid)
        return Reference(place.relative_to(root).as_posix(), tree.oid)


def _add(repo: Any, folder: Path) -> Tree:
    """Bring the files of `folder` into the cache; what they are called and hold."""
    cache = repo.cache.local
    try:
        staging, _, tree = build(cache, os.fspath(folder), localfs, "md5", ignore=repo.dvcignore)
        failed = transfer(staging, cache, {tree.hash_info}, shallow=False).failed
    except OSError as error:
        message = f"{folder} could not get into {cache.path} ({error}); mend that folder."
        raise SourceError(message) from error
    if failed:
        message = f"{folder} could not get into {cache.path}; is the disk full or read-only?"
        raise SourceError(message)
    return tree


def contents(reference: Reference) -> dict[str, Blob]:
    """The files of a reference by relative path; what the cache lacks comes from the DVC remote.

    Raises:
        SettingError: there is no DVC repository.
        SourceError: neither the cache nor the remote has all of it.
    """
    with repository() as repo:
        found = _cached(repo, reference)
        if found is None:
            _pull(repo, reference)
            found = _cached(repo, reference)
        if found is None:
            message = (
                f"{reference.uri} is neither in the DVC cache nor in its remote; "
                "make it again, or push it from where it was made."
            )
            raise SourceError(message)
        return found


def present(reference: Reference) -> dict[str, Blob]:
    """What of a reference is in the cache, which may be a part of it; the remote is not asked.

    Raises:
        SettingError: there is no DVC repository.
    """
    with repository() as repo:
        return {n: b for n, b in _named(repo, reference).items() if b.path.is_file()}


def exists(reference: Reference) -> bool:
    """True if the cache has all of it, or the DVC remote its list of files, which is pushed last.

    Raises:
        SettingError: there is no DVC repository.
    """
    with repository() as repo:
        if _cached(repo, reference) is not None:
            return True
        try:
            remote = repo.cloud.get_remote_odb(command="status")
            return bool(remote.exists(reference.oid))
        except (DvcException, OSError):  # no remote, or none that answers
            return False


def _cached(repo: Any, reference: Reference) -> dict[str, Blob] | None:
    files = _named(repo, reference)
    return files if files and all(blob.path.is_file() for blob in files.values()) else None


def _named(repo: Any, reference: Reference) -> dict[str, Blob]:
    cache = repo.cache.local
    return {
        name: Blob(Path(cache.oid_to_path(info.value)), info.value)
        for name, info in _listed(cache, reference).items()
    }


def _listed(cache: Any, reference: Reference) -> dict[str, HashInfo]:
    try:
        tree = Tree.load(cache, HashInfo("md5", reference.oid))
    except FileNotFoundError:
        return {}
    listed = {"/".join(key): info for key, (_, info) in sorted(tree.iteritems())}
    for name, info in listed.items():
        if not stays_inside(name) or not FILE.fullmatch(info.value or ""):
            message = f"{reference.uri} lists {name!r}, which lies outside of it; do not trust it."
            raise SourceError(message)
    return listed


def _pull(repo: Any, reference: Reference) -> None:
    cache = repo.cache.local
    try:
        remote = repo.cloud.get_remote_odb(command="pull")
        transfer(remote, cache, {HashInfo("md5", reference.oid)}, verify=remote.verify)
        absent = {b.md5 for b in _named(repo, reference).values() if not b.path.is_file()}
        files = {HashInfo("md5", file) for file in absent}
        pulled = Pulled(f"{SCHEME}://{reference.path}", remote, sorted(absent))
        transfer(remote, cache, files, verify=remote.verify, callback=pulled)
    except (DvcException, OSError) as error:
        message = (
            f"{reference.uri} is not in the DVC cache and could not be pulled "
            f"({' '.join(str(error).split())}); set a DVC remote that has it, or make it again."
        )
        raise SourceError(message) from error
