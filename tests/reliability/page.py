"""docs/reliability.md from the figures of `make reliability`: what was tried, and what held."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = Path(__file__).parent / "head.md"
PAGE = ROOT / "docs/reliability.md"
FIGURES = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class Row:
    """A claim of one test file, how often it was tried and how often it held."""

    file: str
    claim: str
    tried: int
    held: int


def keep(rows: Sequence[Row]) -> None:
    """Put new figures in the place of older ones of the same claims, and write the page."""
    found = {(row.file, row.claim): row for row in [*kept(), *rows]}
    ordered = [found[key] for key in sorted(found)]
    FIGURES.write_text(json.dumps([asdict(row) for row in ordered], indent=2) + "\n", "utf-8")
    PAGE.write_text(page(ordered), "utf-8")


def kept() -> list[Row]:
    """All figures that were kept so far."""
    return [Row(**found) for found in json.loads(FIGURES.read_text("utf-8"))]


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    lines = ["| what was tried | times | held |", "|:--|--:|--:|"]
    lines += [f"| {row.claim} | {row.tried} | {row.held} |" for row in rows]
    tried, held = (sum(getattr(row, name) for row in rows) for name in ("tried", "held"))
    lines.append(f"| all | {tried} | {held} |")
    return HEAD.read_text("utf-8").strip() + "\n\n" + "\n".join(lines) + "\n"
