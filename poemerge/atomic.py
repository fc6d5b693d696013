"""Write beside, then rename: what stands under its final name is complete."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from poemerge.errors import MachineError, PoemergeError, SettingError, UnreachableError

PARTIAL = ".partial"
# What the disk says where the fault is not in what was asked for.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def new_folder(out: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its place on success and vanishes on error.

    Args:
        out: final place; what stands there already is replaced only once the work is done.
        resumable: True for work that goes on from what an earlier try has left in the folder, which
            is empty otherwise. What there is when the work is interrupted, or the machine gives
            out, is then left to the next try; what is refused vanishes all the same.

    Raises:
        SettingError: a link stands there, or where the work is to be done.
        MachineError: the disk is full, read-only or broken.
    """
    partial = _beside(out)
    for place in (out, partial):
        if place.is_symlink():
            raise SettingError(
                f"{place} is a link, and results are never written through one; name the folder "
                "that it leads to, or remove the link."
            )
    if not resumable:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(out):
            partial.mkdir(parents=True, exist_ok=resumable)
            yield partial
            _put(partial, out)
    except BaseException as error:
        if is_refusal(error) or not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # it is not empty, or not there
            partial.rmdir()
        raise


def is_refusal(error: BaseException) -> bool:
    """True for what would be refused again; False for what may pass, such as a full disk."""
    passing = MachineError, UnreachableError
    return isinstance(error, PoemergeError) and not isinstance(error, passing)


@contextmanager
def disk_errors(place: Path | str) -> Iterator[None]:
    """Say in a sentence that the disk is full, read-only or broken.

    Args:
        place: what the block is to make.

    Raises:
        MachineError: it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f": {error.filename}" if error.filename else ""
        message = f"{place} could not be made ({error.strerror}{where}); mend that and run again."
        raise MachineError(message) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 at `path`, whole or not at all."""
    partial = _beside(path)
    with disk_errors(path):
        partial.unlink(missing_ok=True)
        try:
            with partial.open("x", encoding="utf-8") as file:  # never through somebody else's link
                file.write(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON at `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _beside(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _put(folder: Path, out: Path) -> None:
    """Replace `out`: whoever is killed on the way leaves it whole, or leaves none."""
    old = _beside(out.with_name(out.name + ".old"))
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)
