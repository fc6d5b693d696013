"""`hf://org/name@revision`: a model on the Hugging Face hub, or on the mirror of HF_ENDPOINT."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import disable_progress_bars

from poemerge.errors import SourceError
from poemerge.hashing import digest, sha256
from tasks.fetch.growth import growing
from tasks.fetch.layout import select
from tasks.fetch.origin import OfflineError, Origin, UnreachableError
from tasks.fetch.pickles import settle

ADDRESS = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
GIT = "git:"
BUSY = {408, 429}


def open_repository(address: str) -> Origin:
    """Resolve `org/name@revision` (`main` if it names none) to a commit; nothing is downloaded yet.

    Raises:
        SourceError: no such model or revision, no access to it, or no weights in it.
        UnreachableError: the hub does not answer.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise SourceError(f"hf://{address} is no model of a hub; write hf://org/name@revision.")
    repo, revision = parts["repo"], parts["revision"] or "main"
    with explained(address):
        info = HfApi(endpoint=endpoint()).model_info(repo, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = select(f"hf://{address}", siblings)
    files = {name: _stated(siblings[name]) for name in names}
    size = sum(siblings[name].size or 0 for name in names)
    commit = str(info.sha)
    return Origin(
        files,
        sha256=digest(files),
        revision=commit,
        write=_Snapshot(address, repo, commit, files, size).download,
        settings={"revision": commit},
    )


@dataclass(frozen=True)
class _Snapshot:
    """The files of a commit: name → stated hash, and how many bytes they are."""

    address: str
    repo: str
    commit: str
    files: Mapping[str, str]
    size: int

    def download(self, folder: Path) -> None:
        disable_progress_bars()  # the hub's own, which would write over ours
        with explained(self.address), growing(folder, f"hf://{self.address}", self.size):
            snapshot_download(
                self.repo,
                revision=self.commit,
                local_dir=folder,
                allow_patterns=[escape(name) for name in self.files],
                endpoint=endpoint(),
            )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        for name, stated in self.files.items():
            _verify(f"{name} of hf://{self.address}", folder / name, stated)
        settle(folder, self.files)


def endpoint() -> str | None:
    """HF_ENDPOINT as it is now: huggingface_hub reads it only once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _stated(file: RepoSibling) -> str:
    """The hash that the hub states: sha256 of a large file, git's blob id of a small one."""
    return file.lfs.sha256 if file.lfs else f"{GIT}{file.blob_id}"


def _verify(what: str, path: Path, stated: str) -> None:
    found = _git_blob(path) if stated.startswith(GIT) else sha256(path)
    if found != stated:
        raise SourceError(
            f"{what} arrived with hash {found} where the hub states {stated}; fetch it again, and "
            "if it stays so, distrust the mirror or proxy in between."
        )


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    header = b"blob %d\0" % len(content)
    return GIT + hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence; no header, and so no token, is in it."""
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
        if getattr(error, "errno", None) is not None:  # of this machine, such as a full disk
            raise
        raise _explain(f"hf://{address}", error) from error


def _explain(source: str, error: Exception) -> SourceError:
    host = urlsplit(endpoint() or "https://huggingface.co").hostname
    # "Not in the local cache either" is no news here: what counts is why the hub gave nothing.
    match error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error:
        case OfflineModeIsEnabled():
            return OfflineError(f"{source} needs the hub, but HF_HUB_OFFLINE is set; unset it.")
        case HFValidationError():
            return SourceError(f"{source} is no model of a hub; write hf://org/name@revision.")
        case RevisionNotFoundError():
            return SourceError(f"{source} has no such revision; name a branch, a tag or a commit.")
        case RepositoryNotFoundError():
            return SourceError(
                f"{source} does not exist on {host} or is closed to you; check the name, accept "
                "its terms there, and set HF_TOKEN."
            )
        case HfHubHTTPError(response=answer) if not _is_passing(answer.status_code):
            return SourceError(
                f"{source} was refused by {host} with status {answer.status_code}; check HF_TOKEN."
            )
        case HfHubHTTPError(response=answer):
            reason = f"answers with status {answer.status_code}"
        case cause:
            reason = f"cannot be reached or broke off ({type(cause).__name__})"
    return UnreachableError(f"{source} cannot be fetched, for {host} {reason}; try again later.")


def _is_passing(status: int) -> bool:
    return status in BUSY or status >= httpx.codes.INTERNAL_SERVER_ERROR
