"""One merge at a time on a device: who holds it, and who waits behind whom (decision 0007).

A ticket is a file that its owner keeps locked, and the lowest one holds the device. The kernel lets
go of the lock when the owner dies, however it dies, so that no server and no expiry is needed.
"""

import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from poemerge.alone import command
from poemerge.device import device_id, pick_device, split_devices
from poemerge.errors import SettingError

VARIABLE = "POEMERGE_QUEUE"
EVERY = 0.5  # seconds between two looks at who is ahead
NUMBER = re.compile(r"\d{8,}")  # name of a ticket; anything else there is nobody's

logger = logging.getLogger(__name__)
# What is held here already: who has a device must not wait for itself.
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())


@dataclass(frozen=True)
class Ticket:
    """Someone who holds a device or waits for it.

    Attributes:
        device: `cpu`, or `cuda-` and the GPU's own id.
        number: its place: the lowest holds the device.
        since: when it was drawn.
        folder: where the command was given.
    """

    device: str
    number: int
    pid: int
    command: str
    folder: str
    since: str

    @classmethod
    def drawn(cls, device: str, number: int) -> Self:
        """The ticket of this process."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(device, number, os.getpid(), command(), str(Path.cwd()), since)

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}, in {self.folder}) since {self.since}"


@contextmanager
def turn(devices: Iterable[str]) -> Iterator[None]:
    """Wait for the devices, and hold them for the block.

    Args:
        devices: auto, cpu or cuda[:i] each, or several of these (`cuda:0,cuda:1`).

    Raises:
        SettingError: there is no such device.
    """
    already = _held.get()
    names = {name for device in devices for name in split_devices(device)}
    wanted = {device_id(pick_device(name)) for name in names} - already
    with ExitStack() as stack:
        for device in sorted(wanted):  # one order for all, or two could wait for each other
            _wait(stack.enter_context(_ticket(device)))
        token = _held.set(already | wanted)
        try:
            yield
        finally:
            _held.reset(token)


def tickets(device: str) -> list[Ticket]:
    """Who holds the device, and then who waits for it, in order."""
    with _alone(_folder(device)) as folder:
        return _held_in(folder)


def devices() -> list[str]:
    """Devices that somebody has ever waited for."""
    return sorted(folder.name for folder in _root().iterdir()) if _root().is_dir() else []


@contextmanager
def _ticket(device: str) -> Iterator[Ticket]:
    """Draw the next number, and keep its file locked."""
    with _alone(_folder(device)) as folder:
        before = _held_in(folder)
        own = Ticket.drawn(device, before[-1].number + 1 if before else 1)
        path = folder / f"{own.number:08}"
        file = path.open("x", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        path.chmod(0o644)  # whatever the umask: other people read it to see who they wait for
        file.write(json.dumps(asdict(own)))
        file.flush()
    try:
        yield own
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _wait(own: Ticket) -> None:
    """Return when nobody is ahead, having said who is whenever that changes."""
    told: list[Ticket] = []
    while ahead := [ticket for ticket in tickets(own.device) if ticket.number < own.number]:
        if ahead != told:
            logger.info(
                "waiting for %s, held by %s; %d of %d in the queue",
                *(own.device, ahead[0], len(ahead), len(tickets(own.device)) - 1),
            )
            told = ahead
        time.sleep(EVERY)


def _root() -> Path:
    """One folder for all who use this machine."""
    return Path(os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / "poemerge-queue")


def _folder(device: str) -> Path:
    """Where a device's tickets lie; everybody may add one, and remove but their own."""
    folder = _root() / device
    for place in (_root(), folder):
        with suppress(FileExistsError):
            place.mkdir()
            place.chmod(0o1777)
        if place.is_symlink():
            message = (
                f"{place} is a link, which others may have laid; remove it, or set {VARIABLE}."
            )
            raise SettingError(message)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Nobody else draws a ticket or counts them meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(handle)


def _held_in(folder: Path) -> list[Ticket]:
    """Tickets with a living owner, lowest first; others are thrown away."""
    found = []
    for path in (p for p in sorted(folder.iterdir()) if NUMBER.fullmatch(p.name) and p.is_file()):
        with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(Ticket(**json.load(file)))
            else:
                with suppress(PermissionError):  # another person's, whose next merge will do it
                    path.unlink()
    return found
