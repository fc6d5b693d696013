"""Where a result may be written: never over a source, and over older work only on request."""

from collections.abc import Sequence
from pathlib import Path

from poemerge.errors import SettingError


def check_out(out: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output folder that would harm what is there.

    Raises:
        SettingError: it is, holds or lies in a source, or exists and `overwrite` is False.
    """
    resolved = out.resolve()
    for source in (source.resolve() for source in sources):
        if resolved in (source, *source.parents) or source in resolved.parents:
            raise SettingError(
                f"{out} is, holds or lies in the source {source}; choose another folder."
            )
    if out.exists() and not overwrite:
        raise SettingError(f"{out} exists already; choose another folder, or say `--overwrite`.")
