"""What params.yaml says beside each of its keys."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

# A `#` begins a comment where a space is before it, and no quote is open.
COMMENT = re.compile(r"""(?:[^#"']|"[^"]*"|'[^']*'|(?<=\S)#)*(?<!\S)#\s*(.*)""")


class Said(NamedTuple):
    """A key's value, and the comment above and beside it."""

    value: Any
    remark: str


def remarks(file: Path) -> dict[str, Said]:
    """Each key of a YAML file, named from the top down (`fetch.base`) → what stands there."""
    text = file.read_text(encoding="utf-8")
    return dict(_below("", YAML().load(text), text.splitlines()))


def _below(above: str, tree: CommentedMap, lines: list[str]) -> Iterator[tuple[str, Said]]:
    for key, value in tree.items():
        line, column = tree.lc.key(key)
        is_first = not lines[line][:column].strip()  # of the keys in its line, whose comment it is
        yield f"{above}{key}", Said(value, _remark(lines, line) if is_first else "")
        if isinstance(value, CommentedMap):
            yield from _below(f"{above}{key}.", value, lines)


def _remark(lines: list[str], line: int) -> str:
    first = line
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    found = (COMMENT.match(text) for text in lines[first : line + 1])
    return " ".join(match[1] for match in found if match)
