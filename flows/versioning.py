"""The DVC side of the flow: what its stage functions made is committed as `dvc repro` would.

The same functions, then the same `dvc.lock`, byte for byte. Committing blesses whatever stands in
the working directory, so only stages that were just made, or found to be current, are named here.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.rwlock import RWLOCK_FILE, RWLockFileCorruptedError

from poemerge.atomic import PARTIAL
from poemerge.errors import PoemergeError, SettingError, SourceError
from tasks.dvc_store.reference import repository

GRAPH, LOCK = "dvc.yaml", "dvc.lock"
KEPT = f"{LOCK}.kept"  # as it was, as long as DVC writes it
PATIENCE = 120.0  # seconds to wait while another DVC process holds the stage
PAUSE = 0.5  # seconds between two tries

T = TypeVar("T")


def check() -> None:
    """See that the working directory can be committed to, before any work is done.

    Raises:
        SettingError: it is no DVC repository, or has no dvc.yaml.
    """
    with _repository():
        pass


def commit(stages: Iterable[str], params: Mapping[str, Any]) -> None:
    """Write `stages` into dvc.lock and their outputs into the DVC cache.

    Costs 20 ms a stage where all of it is there already.

    Args:
        stages: names as dvc.yaml has them (`fetch`, `merge@ties`), in its order: new entries are
            appended to the lock in the order in which they come.
        params: params.yaml as it was read when the work began.

    Raises:
        SettingError: there is no repository, no such stage, or params.yaml was edited meanwhile.
        SourceError: an output is missing, or the cache cannot take it, or DVC stays locked.
    """
    with _repository() as repo, _kept(Path(repo.tmp_dir, KEPT)):
        for stage in stages:
            _check_params(_load(repo, stage), params)
            _patiently(partial(_commit, repo, f"{GRAPH}:{stage}"))


def push() -> int:
    """Bring the outputs that dvc.lock names to the DVC remote; how many objects it lacked.

    Raises:
        SettingError: there is no repository.
        SourceError: the remote refused, or DVC stays locked.
    """
    with _repository() as repo:
        return _patiently(partial(_push, repo))


@contextmanager
def _repository() -> Iterator[Any]:
    if not Path(GRAPH).is_file():
        message = f"{Path.cwd()} has no {GRAPH}; run in the project's root, where it lies."
        raise SettingError(message)
    with repository() as repo:
        yield repo


@contextmanager
def _kept(copy: Path) -> Iterator[None]:
    """Go on from the lock as it was where a commit was killed: DVC writes it in place."""
    lock, partial = Path(LOCK), copy.with_name(copy.name + PARTIAL)
    if copy.exists():
        lock.unlink(missing_ok=True)
        if copy.stat().st_size:
            shutil.copyfile(copy, lock)
    partial.write_bytes(lock.read_bytes() if lock.exists() else b"")
    partial.replace(copy)
    try:
        yield
    except PoemergeError:  # DVC refused, and has left the lock whole
        copy.unlink()
        raise
    copy.unlink()


def _load(repo: Any, name: str) -> Any:
    try:
        return repo.stage.load_one(GRAPH, name)
    except DvcException as error:
        message = f"{GRAPH} has no usable stage {name} ({error}); mend it there."
        raise SettingError(message) from error


def _check_params(stage: Any, params: Mapping[str, Any]) -> None:
    """An edit during the run would be committed together with outputs made from the old values."""
    for dependency in stage.deps:
        if isinstance(dependency, ParamsDependency):
            for key, value in dependency.read_params().items():
                if reduce(_item, key.split("."), params) != value:
                    message = (
                        f"{key} in {dependency} is not what {stage.addressing} was made with; "
                        "run again with that file as it is now."
                    )
                    raise SettingError(message)


def _item(tree: Any, key: str) -> Any:
    return tree.get(key) if isinstance(tree, Mapping) else None


def _commit(repo: Any, target: str) -> None:
    try:
        (stage,) = repo.commit(target, force=True)
    except LockError:
        raise
    except RWLockFileCorruptedError as error:  # its writer was killed; DVC makes it anew
        Path(repo.tmp_dir, RWLOCK_FILE).unlink(missing_ok=True)
        raise LockError(str(error)) from error
    except (DvcException, OSError) as error:
        message = f"DVC could not commit {target} ({error}); make that stage again."
        raise SourceError(message) from error
    for out in stage.outs:
        if out.changed_cache():  # DVC only logs it
            message = f"{out} did not get into {out.cache.path}; is the disk full or read-only?"
            raise SourceError(message)


def _push(repo: Any) -> int:
    try:
        return int(repo.push())
    except LockError:
        raise
    except (DvcException, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"DVC could not push ({reason}); mend the DVC remote.") from error


def _patiently(action: Callable[[], T]) -> T:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except LockError as error:
            if time.monotonic() > deadline:
                message = (
                    f"DVC is still locked after {PATIENCE:.0f} s ({error}); stop what holds it."
                )
                raise SourceError(message) from error
            time.sleep(PAUSE)
