"""Write beside, then rename: what stands under its final name is complete."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poemerge.errors import SettingError

PARTIAL = ".partial"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place on success and vanishes on error.

    Args:
        out: final place; what stands there already is replaced only once the work is done.

    Raises:
        SettingError: a link stands there, or where the work is to be done.
    """
    partial = out.with_name(out.name + PARTIAL)
    for place in (out, partial):
        if place.is_symlink():
            raise SettingError(
                f"{place} is a link, and results are never written through one; name the folder "
                "that it leads to, or remove the link."
            )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 at `path`, whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:  # never through what somebody else put there
        file.write(text)
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON at `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
