"""What stands where a file should be, and is none, or is one that cannot be read."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

SPARSE = 1 << 42  # bytes, of which none is on disk


def folder(path: Path) -> None:
    """A folder."""
    path.mkdir()


def full_folder(path: Path) -> None:
    """A folder that holds a file of its own name."""
    path.mkdir()
    (path / path.name).write_bytes(b"{}")


def fifo(path: Path) -> None:
    """A FIFO, which keeps whoever opens it waiting."""
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    """A socket."""
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's whole path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def dangling(path: Path) -> None:
    """A link to nothing."""
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    """A link to itself."""
    path.symlink_to(path.name)


def long_loop(path: Path) -> None:
    """Two links to each other."""
    other = path.with_name(f"{path.name}.other")
    path.symlink_to(other.name)
    other.symlink_to(path.name)


def endless(path: Path) -> None:
    """A link to a device without an end."""
    path.symlink_to("/dev/zero")


def void(path: Path) -> None:
    """A link to a device with nothing in it."""
    path.symlink_to("/dev/null")


def process(path: Path) -> None:
    """A link to a file of the kernel's, which states no size."""
    path.symlink_to("/proc/self/environ")


def sparse(path: Path) -> None:
    """A file of terabytes of NULs."""
    with path.open("wb") as stream:
        stream.truncate(SPARSE)


def missing(path: Path) -> None:
    """Nothing."""


def secret(path: Path) -> None:
    """A file that nobody may read, but the superuser."""
    path.write_bytes(b"{}")
    path.chmod(0)


PLACES: tuple[Callable[[Path], None], ...] = (
    folder,
    full_folder,
    fifo,
    bound_socket,
    dangling,
    loop,
    long_loop,
    endless,
    void,
    process,
    sparse,
    missing,
    secret,
)
