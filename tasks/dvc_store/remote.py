"""The DVC remote, from which every other machine has what a reference names."""

from typing import Any

from dvc.config import NoRemoteError
from dvc.exceptions import DvcException
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.transfer import transfer

from poemerge.errors import SettingError, SourceError
from tasks.dvc_store.reference import Reference, contents, repository


def check_remote() -> None:
    """See that there is a remote to push to.

    Raises:
        SettingError: there is no repository, no remote, or DVC lacks what that remote needs.
    """
    with repository() as repo:
        _remote(repo)


def push(reference: Reference) -> int:
    """Bring what a reference names to the DVC remote; how many objects it lacked.

    Raises:
        SettingError: as `check_remote`.
        SourceError: the cache has not all of it, or the remote refused.
    """
    files = {HashInfo("md5", blob.md5) for blob in contents(reference).values()}
    with repository() as repo:
        cache, remote = repo.cache.local, _remote(repo)
        pushed = 0
        try:  # the files first: a tree in the remote is whole
            for objects in (files, {HashInfo("md5", reference.oid)}):
                done = transfer(cache, remote, objects)
                pushed += len(done.transferred)
                if done.failed:
                    message = f"{len(done.failed)} objects of {reference.uri} were not pushed."
                    raise SourceError(message)
        except (DvcException, OSError) as error:
            reason = " ".join(str(error).split())
            message = f"{reference.uri} could not be pushed ({reason}); mend the DVC remote."
            raise SourceError(message) from error
        return pushed


def _remote(repo: Any) -> Any:
    try:
        return repo.cloud.get_remote_odb(command="push")
    except NoRemoteError as error:
        message = (
            f"{repo.root_dir} has no default DVC remote to push to; "
            "add one: `dvc remote add -d NAME URL`."
        )
        raise SettingError(message) from error
    except DvcException as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"The DVC remote cannot be used ({reason}); mend it.") from error
