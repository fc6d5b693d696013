"""Where a result may be written: never over a source, and over older work only on request."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from poemerge.alone import alone
from poemerge.errors import SettingError
from poemerge.names import real_path


@contextmanager
def reserved(outs: Sequence[Path], sources: Sequence[Path], *, overwrite: bool) -> Iterator[None]:
    """Hold output folders for the block, after whoever makes them now.

    Args:
        outs: the folder to make, and what is made with it.
        sources: that must stay as they are.
        overwrite: replace a folder that exists, even if it came while we waited.

    Raises:
        SettingError: see `check_out`.
    """
    for out in outs:
        check_out(out, sources, overwrite=overwrite)
    with alone(outs[0]):
        for out in outs:
            check_out(out, sources, overwrite=overwrite)
        yield


def check_out(out: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output folder that would harm what is there.

    Raises:
        SettingError: it is, holds or lies in a source, or exists and `overwrite` is False.
    """
    resolved = real_path(out)
    for source in map(real_path, sources):
        if resolved in (source, *source.parents) or source in resolved.parents:
            raise SettingError(
                f"{out} is, holds or lies in the source {source}; choose another folder."
            )
    if out.exists() and not overwrite:
        raise SettingError(f"{out} exists already; choose another folder, or say `--overwrite`.")
