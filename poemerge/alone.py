"""One at a time: whoever makes something holds it, and others wait or are told for whom.

The hold is a lock on a file beside the place, which names its holder and vanishes with the work.
The kernel lets go of the lock when the holder dies, however it dies; the file is then taken over.
"""

import fcntl
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from poemerge.atomic import PARTIAL
from poemerge.errors import SettingError
from poemerge.redaction import redact

LOCK = f".lock{PARTIAL}"
WIDTH = 100  # of a command, as others are shown it

logger = logging.getLogger(__name__)


@contextmanager
def alone(place: Path, *, patient: bool = True) -> Iterator[None]:
    """Hold a place for the block, after whoever holds it now.

    Args:
        place: what the block makes; its folder is made if need be.
        patient: False to be refused rather than to wait.

    Raises:
        SettingError: another process holds it, and we are not patient.
    """
    path = place.with_name(place.name + LOCK)
    with ExitStack() as stack:
        if file := _locked(path, place, patient=patient):
            stack.enter_context(file)
            stack.callback(path.unlink, missing_ok=True)  # while it is locked: nobody has it
            with suppress(OSError):  # the disk is full, and the name is for people
                file.truncate(0)
                file.write(_holder().encode())
        yield


def clear(folder: Path) -> None:
    """Take away, everywhere in a folder, the locks that the killed have left; others stay."""
    for path in folder.rglob(f"*{LOCK}"):
        place = path.with_name(path.name.removesuffix(LOCK))
        with suppress(SettingError), alone(place, patient=False):
            pass  # what is taken over is taken away


def command() -> str:
    """What this process was started as, short enough to be shown to others."""
    words = (Path(w).name if w.startswith("/") else w for w in sys.orig_argv)
    return textwrap.shorten(redact(" ".join(words)), WIDTH, placeholder=" …")


def _locked(path: Path, place: Path, *, patient: bool) -> IO[bytes] | None:
    """The file at `path`, locked; None where nothing can be written, as the work will find too."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError:
            return None
        try:
            _lock(file, place, patient=patient)
        except BaseException:
            file.close()
            raise
        if _is_at(path, file):
            return file
        file.close()  # its holder has deleted it while we waited


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], place: Path, *, patient: bool) -> None:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    file.seek(0)
    holder = file.read().decode() or "another process"
    if not patient:
        raise SettingError(f"{place} is held by {holder}; run again when that has ended.")
    logger.info("waiting for %s, held by %s", place, holder)
    fcntl.flock(file, fcntl.LOCK_EX)


def _holder() -> str:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} ({command()}, in {Path.cwd()}) since {since}"
