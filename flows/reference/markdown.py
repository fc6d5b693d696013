"""Markdown that a forge and the site read alike."""

from collections.abc import Iterable, Sequence

SPECIAL = "<|*"  # what Markdown would take for its own, within a line and within a cell


def code(text: str) -> str:
    """`text` as code; a bar would end the cell of a table, so that such text is HTML."""
    return f"<code>{_literal(text)}</code>" if "|" in text else f"`{text}`"


def prose(text: str) -> str:
    """Sentences in which backticks mark code, and nothing else means anything."""
    parts = text.split("`")
    return "".join(code(part) if i % 2 else _literal(part) for i, part in enumerate(parts))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its cells being Markdown already; nothing where there are no rows."""
    lines = [_line(row) for row in rows]
    return "\n".join([_line(header), "|---" * len(header) + "|", *lines]) + "\n" if lines else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |"


def _literal(text: str) -> str:
    return "".join(f"&#{ord(letter)};" if letter in SPECIAL else letter for letter in text)
