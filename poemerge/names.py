"""Names that do not collide, and that lead nowhere else."""

import os
from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath

from poemerge.errors import SourceError


def unused_name(name: str, taken: Container[str]) -> str:
    """`name`, or `name-2`, `name-3` and so on where it is taken."""
    fresh, count = name, 2
    while fresh in taken:
        fresh, count = f"{name}-{count}", count + 1
    return fresh


def listed(names: Sequence[object], most: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(f"{name}" for name in names[:most])  # paths in a stand-in differ as str
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def stays_inside(name: str) -> bool:
    """True if a relative path that somebody else has written leads to a file below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def real_path(path: Path) -> Path:
    """Where links lead to; links in a circle, at which `resolve` breaks off, lead to themselves."""
    return Path(os.path.realpath(path))


def check_link(file: Path) -> None:
    """Refuse a link that leads out of its folder: a copy would hold what the folder never did.

    The hub's own cache is a folder of links to the blobs beside it; these are followed. One that
    leads nowhere at all is for its reader to refuse.

    Raises:
        SourceError: naming the link.
    """
    folder, target = real_path(file.parent), real_path(file)
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and target.parent != blobs:
        raise SourceError(
            f"{file} is a link that leads out of its folder; copy the folder with its links "
            "resolved (`cp -rL`) and give the copy."
        )
