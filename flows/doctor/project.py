"""The project itself: git, DVC and its remote, and the folders that are written to."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.lock import LockError

from flows.doctor.finding import Finding, problem, warning
from flows.doctor.services import ask
from flows.places import CACHE, cache
from poemerge.errors import SettingError
from poemerge.redaction import redact
from tasks.dvc_store.reference import repository

PATIENCE = 5.0  # seconds that git may take
ROOM, LEAST = 10e9, 1e9  # bytes free: below the first is a warning, below the second a problem


def git() -> Iterator[Finding]:
    """Commit and edits of the working directory."""
    try:
        commit, status = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        said = f"{Path.cwd()} has no commit"
        yield warning("git", said, "git init, git add, git commit: then a run can be found again")
        return
    edited = len(status.splitlines())
    if edited:
        differ = "1 file differs" if edited == 1 else f"{edited} files differ"
        said = f"{differ} from {commit}"
        yield warning("git", said, "commit them, or a run cannot be told from its commit")
    else:
        yield Finding("git", f"at {commit}, nothing edited")


def _git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed words
        ["git", *arguments],  # noqa: S607 - the git of the user's path
        check=True, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    return done.stdout.strip()


def data() -> Iterator[Finding]:
    """Whether what DVC tracks is what its lock file says."""
    try:
        with repository() as repo:
            changed = repo.status()
    except SettingError as error:
        yield problem("DVC", str(error), "git init, dvc init")
    except LockError:
        yield warning("DVC", "somebody is at work in this repository", "wait for their end")
    except DvcException as error:
        yield problem("DVC", " ".join(str(error).split()), "mend dvc.yaml or dvc.lock")
    else:
        yield (
            warning("DVC", f"not as dvc.lock has it: {', '.join(changed)}", "poemerge run")
            if changed
            else Finding("DVC", "all is as dvc.lock has it")
        )


def remote() -> Iterator[Finding]:
    """The default remote, where others and later times find what runs made."""
    try:
        with repository() as repo:
            name = repo.config["core"].get("remote")
            if not name:
                said = "none: what runs make is in this machine's cache alone"
                yield warning("DVC remote", said, "dvc remote add --default NAME URL")
                return
            yield _judge(repo, name, repo.config["remote"].get(name, {}))
    except SettingError:
        return  # said by `data`


def _judge(repo: Any, name: str, settings: Mapping[str, Any]) -> Finding:
    label, url = f"DVC remote {name}", str(settings.get("url", ""))
    shown = redact(url)
    if url.startswith(("http://", "https://")) and isinstance(answer := ask(url), str):
        return problem(label, f"{shown} {answer}", "start it, or `dvc remote modify` its url")
    try:
        found = repo.cloud.get_remote(name)
        there = found.fs.exists(found.path)
    except Exception as error:  # noqa: BLE001 - every kind of storage raises its own
        said = f"{shown} cannot be used ({type(error).__name__})"
        return problem(label, said, "see `dvc remote modify --local` for its credentials")
    if found.fs.protocol != "local":
        return Finding(label, f"{shown} answers" if there else f"{shown} answers, and is empty")
    if not _is_writable(_standing(Path(found.path))):
        return problem(label, f"{shown} is not writable", "get the right to write there")
    return Finding(label, f"{shown} is writable")


def folders() -> Iterator[Finding]:
    """The places that are written to: may we, and is there room?"""
    places = {
        "project": Path.cwd(),
        CACHE: cache(),
        "HF_HOME": Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")),
        "PREFECT_HOME": Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")),
    }
    for name, folder in places.items():
        yield _room(name, folder)


def _room(name: str, folder: Path) -> Finding:
    standing = _standing(folder)
    free = shutil.disk_usage(standing).free
    said = f"{folder}: {free / 1e9:.0f} GB free"
    if not _is_writable(standing):
        return problem(name, f"{folder} is not writable", f"mend its rights, or set {name}")
    if free < LEAST:
        return problem(name, said, "make room: a merge writes as much as its base has")
    if free < ROOM:
        return warning(name, said, "make room: a merge writes as much as its base has")
    return Finding(name, said)


def _standing(folder: Path) -> Path:
    """The folder, or what stands of the way to it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _is_writable(place: Path) -> bool:
    return place.is_dir() and os.access(place, os.W_OK)
