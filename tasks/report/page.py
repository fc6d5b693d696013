"""The page: sections of words, pictures and tables, in one HTML file that needs nothing else."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from tasks.report.figures.style import DARK, LIGHT, THEMES, Theme, png, themed

MOST_ROWS = 400  # of a table
Cell = str | float | None  # numbers are shown as their column says, and sorted as numbers


@dataclass(frozen=True)
class Picture:
    """One figure, drawn in both themes.

    Attributes:
        name: of its files.
        alt: what it shows, with its main number, for who cannot see it.
        caption: what to look at.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Theme], Figure]

    def file(self, theme: Theme) -> str:
        """Name of its file in a theme."""
        return f"{self.name}.png" if theme is LIGHT else f"{self.name}-{theme.name}.png"


@dataclass(frozen=True)
class Column:
    """Of a table; `form` is a format for numbers, None where the cells are words."""

    title: str
    form: str | None = ".1f"

    def show(self, cell: Cell) -> str:
        """A cell as it is read."""
        if cell is None:
            return "–"
        return cell if isinstance(cell, str) else format(cell, self.form or "")


@dataclass(frozen=True)
class Table:
    """Rows of cells; long ones are folded away, and very long ones cut: a browser would freeze."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """The rows that the page has."""
        return self.rows[:MOST_ROWS]

    @property
    def title(self) -> str:
        """The caption, and what is left out."""
        if len(self.rows) <= MOST_ROWS:
            return self.caption
        return f"{self.caption}: the first {MOST_ROWS} of {len(self.rows)}, all in report.json"


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; `key` is its anchor."""

    key: str
    title: str
    words: Sequence[str]
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Summary:
    """What stands above everything else.

    Attributes:
        headline: the winner, or the one merge.
        facts: name → value; short.
        settings: of that merge.
        warnings: label → sentences of its merge.
    """

    headline: str
    words: Sequence[str]
    facts: Mapping[str, str]
    settings: Mapping[str, str]
    warnings: Mapping[str, Sequence[str]]


def draw(sections: Sequence[Section]) -> dict[str, bytes]:
    """File name → PNG of every picture in every theme."""
    drawn = {}
    for theme in THEMES:
        for picture in (picture for section in sections for picture in section.pictures):
            with themed(theme):
                drawn[picture.file(theme)] = png(picture.draw(theme))
    return drawn


def render(
    title: str, summary: Summary, sections: Sequence[Section], pictures: Mapping[str, bytes]
) -> str:
    """The page as text.

    Args:
        title: of the page.
        summary: what stands first.
        sections: in order.
        pictures: file name → PNG, as `draw` gives them.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = _asset("page.css"), _asset("page.js")
    # Nothing may be loaded from anywhere, and no script runs but our own.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_pin(style)}'; "
        f"script-src '{_pin(script)}'; base-uri 'none'; form-action 'none'"
    )
    return environment.from_string(_asset("page.html.jinja")).render(
        title=title,
        summary=summary,
        sections=sections,
        style=style,
        script=script,
        policy=policy,
        light=LIGHT,
        dark=DARK,
        source=lambda picture, theme: _data_uri(pictures[picture.file(theme)]),
        size=lambda picture: _size(pictures[picture.file(LIGHT)]),
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _pin(text: str) -> str:
    """The hash by which a content security policy knows an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height that a PNG's header states, so that nothing moves while it loads."""
    return int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])
