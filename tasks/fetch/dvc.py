"""`dvc://path/<md5>.dir`: what DVC holds; `dvc://path`, `dvc://path@rev`: what its lock names."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

from dvc.exceptions import DvcException
from dvc.repo.brancher import switch

from poemerge.errors import SourceError
from poemerge.hashing import digest, sha256
from poemerge.layout import RECORD
from poemerge.lineage import Lineage
from tasks.dvc_store.reference import OID, Blob, Reference, contents, repository
from tasks.fetch.layout import find_room, flat
from tasks.fetch.origin import Origin
from tasks.fetch.pickles import settle

FORMS = "dvc://path/<md5>.dir, dvc://path or dvc://path@revision"


def open_content(address: str) -> Origin:
    """Resolve the address to a folder's hash, and hash the files behind it.

    Args:
        address: `path/<md5>.dir` says which content; `path` is what dvc.lock has for it now,
            `path@rev` what it had at a git revision. The path may lie inside an output.

    Raises:
        SettingError: there is no DVC repository.
        SourceError: no output stands at the path, or nobody has its bytes.
    """
    reference, inside = _resolve(address)
    uri = "/".join(filter(None, (reference.uri, inside)))
    blobs = _below(inside, contents(reference))
    held = {name: blobs[path] for name, path in flat(uri, blobs).items()}
    files = {name: sha256(blob.path) for name, blob in held.items()}
    return Origin(
        files,
        sha256=digest(files),
        revision=uri,
        write=partial(_copy, held),
        settings={"revision": uri},
        parent=_parent(blobs.get(find_room(blobs) + RECORD)),
    )


def _resolve(address: str) -> tuple[Reference, str]:
    """The content that an address means now, and the path inside it."""
    if any(OID.fullmatch(part) for part in address.split("/")):
        return Reference.parse(f"dvc://{address}")
    path, _, revision = address.strip("/").partition("@")
    return _locked(unquote(path), revision)


def _locked(path: str, revision: str) -> tuple[Reference, str]:
    """What dvc.lock, or a .dvc file, has for a path; at a git revision, if there is one."""
    where = f"dvc://{path}" + (f"@{revision}" if revision else "")
    with repository() as repo:
        try:
            with switch(repo, revision) if revision else nullcontext():
                place = repo.fs.join(repo.root_dir, path)
                (out,) = repo.find_outs_by_path(place, outs=repo.index.outs, strict=False)
                oid, root = out.hash_info.value, out.fs.relpath(out.fs_path, repo.root_dir)
        except DvcException as error:
            reason = " ".join(str(error).split())
            message = f"{where} is nothing that DVC tracks ({reason}); write {FORMS}."
            raise SourceError(message) from error
    if oid is None or not OID.fullmatch(oid):
        message = f"{where} is no folder whose hash dvc.lock has; make and commit it, or name one."
        raise SourceError(message)
    inside = os.path.relpath(path, root)
    return Reference(Path(root).as_posix(), oid), "" if inside == "." else inside


def _below(inside: str, blobs: Mapping[str, Blob]) -> dict[str, Blob]:
    prefix = f"{inside}/" if inside else ""
    return {n.removeprefix(prefix): blob for n, blob in blobs.items() if n.startswith(prefix)}


def _parent(record: Blob | None) -> dict[str, Any] | None:
    if record is None:
        return None
    with TemporaryDirectory() as folder:  # the cache names files by their hashes
        record.copy(Path(folder, RECORD))
        found = Lineage.find(Path(folder))
    return None if found is None else asdict(found)


def _copy(blobs: Mapping[str, Blob], folder: Path) -> None:
    for name, blob in blobs.items():
        blob.copy(folder / name)
    settle(folder, blobs)
