"""The pages of docs/: their text, code blocks and tables."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [page for part in ("", "howto") for page in sorted((DOCS / part).glob("*.md"))]


def read(page: str) -> str:
    """The text of a page, whose path is from docs/."""
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """The code blocks of a page in one language; none named is the shell."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)
    return [code for spoken, code in found if spoken == language]


def run(page: str) -> dict[str, object]:
    """Execute the Python of a page, block after block, as a reader would."""
    space: dict[str, object] = {}
    exec(compile("\n".join(blocks(page, "python")), f"docs/{page}", "exec"), space)
    return space


def rows(page: str, header: str) -> Iterator[list[str]]:
    """Cells of the table that begins with this header."""
    _, _, rest = read(page).partition(header + "\n")
    assert rest, f"{page} has no table {header}"
    for line in rest.splitlines()[1:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]
