"""Documents that others wrote: read whole and within bounds, or refused.

Whatever is wrong with a file becomes an OSError or a ValueError with a reason, for its reader to
say in one sentence what was wanted there.
"""

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

SIZE = 100_000_000  # bytes; what the safetensors library allows a header
LEVELS = 500  # of nesting, which all that walks a tree can bear; a record in a record takes six
BY_HAND = 200_000  # bytes of YAML, of which its parsers read some 50,000 a second
VALUES = 2_000_000  # a few lines of YAML can stand for more


def check_file(path: Path) -> None:
    """Refuse what is no plain file: a FIFO keeps its reader waiting, and a device has no end.

    Raises:
        OSError: it is none, or is not there.
        ValueError: no file can have that name.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")


def is_there(path: Path) -> bool:
    """True if something has that name, be it a link to nothing."""
    return path.is_symlink() or path.exists()


def read_text(path: Path, size: int = SIZE) -> str:
    """The text of a file.

    Args:
        path: of a plain file in UTF-8.
        size: bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no UTF-8.
    """
    check_file(path)
    found = path.stat().st_size
    if found > size:
        raise ValueError(f"it has {found} bytes, where {size} are plenty")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or too deep, no JSON, or has text that UTF-8 cannot hold.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """The JSON value that a text is.

    Raises:
        ValueError: it is too deep, no JSON, or has text that UTF-8 cannot hold.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {LEVELS} levels deep") from error
    check_tree(value)
    return value


def check_tree(value: object) -> None:
    """Refuse a tree of mappings and lists that is too deep or too large to be walked through.

    Raises:
        ValueError: it is, or a branch of it holds itself, or a text is none that UTF-8 can hold.
    """
    level, seen = [value], 0
    for _ in range(LEVELS):
        for text in (each for each in level if isinstance(each, str)):
            text.encode()  # half a surrogate pair can be written as an escape
        inside = [_inside(each) for each in level]
        seen += sum(map(len, inside))
        if seen > VALUES:
            raise ValueError(f"it stands for more than {VALUES} values")
        level = [value for values in inside for value in values]
        if not level:
            return
    raise ValueError(f"it is nested more than {LEVELS} levels deep")


def _inside(value: object) -> Collection[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()
