"""Where a result may be written: never over a source, and over older work only on request."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from poemerge.alone import alone
from poemerge.atomic import new_folder
from poemerge.errors import SettingError
from poemerge.names import real_path
from poemerge.remote.delivery import check_free, delivered
from poemerge.remote.places import locate

Place = Path | str  # a folder here, or the URL of one elsewhere


@contextmanager
def reserved(outs: Sequence[Place], sources: Sequence[Place], *, overwrite: bool) -> Iterator[None]:
    """Hold output folders for the block, after whoever makes them now; those elsewhere are free.

    Args:
        outs: the folder to make, and what is made with it.
        sources: that must stay as they are.
        overwrite: replace a folder that exists, even if it came while we waited.

    Raises:
        SettingError: see `check_out`.
    """
    for out in outs:
        check_out(out, sources, overwrite=overwrite)
    if isinstance(outs[0], str):
        yield
        return
    with alone(outs[0]):
        for out in outs:
            check_out(out, sources, overwrite=overwrite)
        yield


def check_out(out: Place, sources: Sequence[Place], *, overwrite: bool) -> None:
    """Refuse an output folder that would harm what is there.

    Raises:
        SettingError: it is, holds or lies in a source, or exists and `overwrite` is False.
        SourceError: it lies elsewhere, and is closed to us.
    """
    ours = _parts(out)
    for source in sources:
        theirs = _parts(source)
        shared = min(len(ours), len(theirs))
        if ours[:shared] == theirs[:shared]:
            raise SettingError(
                f"{out} is, holds or lies in the source {source}; choose another folder."
            )
    if isinstance(out, str):
        check_free(out, overwrite=overwrite)
    elif out.exists() and not overwrite:
        raise SettingError(f"{out} exists already; choose another folder, or say `--overwrite`.")


def under_way(out: Place, *, resumable: bool) -> AbstractContextManager[Path]:
    """A folder to work in, whose files are at `out` when the block has ended.

    Args:
        out: a folder here (`new_folder`), or the URL of one elsewhere (`delivered`).
        resumable: True for work that goes on from what an earlier try has left.
    """
    return delivered(out) if isinstance(out, str) else new_folder(out, resumable=resumable)


def _parts(place: Place) -> tuple[str, ...]:
    """From the root on; those here and those elsewhere have none in common."""
    place = locate(place)
    return tuple(place.split("/")) if isinstance(place, str) else real_path(place).parts
