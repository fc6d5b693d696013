"""How every picture looks: two themes, one width that a phone can show, colours that stay.

A point of type is about a pixel on a phone of 360 pixels, and twice that on a desk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

WIDTH = 4.7  # inches
DPI = 200
SMALL = 8  # points, for what stands inside a picture
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Theme:
    """Colours on light or on dark; `paper` and `ink` are those of the page.

    Attributes:
        faint: lines and words that stand back.
        colours: of the merges, after Okabe and Ito and after Tol: told apart by everybody.
        cold: one end of the diverging scale, and the full end of the sequential one.
        warm: the other end.
    """

    name: str
    paper: str
    ink: str
    faint: str
    grid: str
    colours: tuple[str, ...]
    cold: str
    warm: str

    @property
    def sequential(self) -> Colormap:
        """From paper, which is nothing, to full colour."""
        return LinearSegmentedColormap.from_list("sequential", [self.paper, self.cold])

    @property
    def diverging(self) -> Colormap:
        """From warm (below) over paper to cold (above)."""
        return LinearSegmentedColormap.from_list("diverging", [self.warm, self.paper, self.cold])

    def of(self, labels: Sequence[str]) -> dict[str, str]:
        """A colour for each label; they repeat when there are more labels than colours."""
        return {label: self.colours[i % len(self.colours)] for i, label in enumerate(labels)}

    def ink_on(self, colour: Any) -> str:
        """What is legible on a cell of this colour (red, green, blue, alpha)."""
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        return "#111111" if luminance > 0.5 else "#ffffff"

    @property
    def settings(self) -> Mapping[str, Any]:
        """For matplotlib."""
        words = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), self.ink)
        lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.faint)
        return {
            **words,
            **lines,
            "figure.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "xtick.minor.size": 0,
            "ytick.minor.size": 0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.labelsize": 9,
            "font.size": 9,
            "xtick.labelsize": SMALL,
            "ytick.labelsize": SMALL,
            "legend.fontsize": SMALL,
            "legend.frameon": False,
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same pixels everywhere
        }


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1b2026",
    faint="#7b8794",
    grid="#e4e8ec",
    colours=(
        *("#0072b2", "#d55e00", "#009e73", "#b8548f", "#e69f00", "#332288"),
        *("#56b4e9", "#882255", "#7a7a2b", "#555555", "#44aa99", "#a0522d"),
    ),
    cold="#0b5d9c",
    warm="#c4501b",
)
DARK = Theme(
    name="dark",
    paper="#161b22",
    ink="#e6e9ed",
    faint="#8b949e",
    grid="#2b323b",
    colours=(
        *("#4aa8e8", "#ff8b4d", "#2fca9c", "#ea9acb", "#f5bd4f", "#a59cf0"),
        *("#9ad6fb", "#db76a6", "#cccc62", "#bbbbbb", "#85dacb", "#dba27f"),
    ),
    cold="#58b3f0",
    warm="#ff8f57",
)
THEMES = (LIGHT, DARK)


def new_figure(height: float) -> Figure:
    """An empty figure of the one width; without pyplot, so that nothing is global."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def png(figure: Figure) -> bytes:
    """The picture as a file; the same figure gives the same bytes."""
    stream = BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": ""}, pil_kwargs={"optimize": True})
    return stream.getvalue()


def plain(name: str) -> str:
    """A name as it is written: a `$` in it begins no formula."""
    return name.replace("$", r"\$")


def themed(theme: Theme) -> Any:
    """A context in which figures are made and saved."""
    return mpl.rc_context({**mpl.rcParamsDefault, **theme.settings})


def panels(count: int, height: float, columns: int = 2, **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure of small panels, row by row.

    Args:
        count: panels in all; places that are left over stay empty.
        height: of one row, in inches.
        columns: most panels in a row.
        **how: to `Figure.subplots`.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(height * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, **how).flatten()
    for empty in axes[count:]:
        empty.set_axis_off()
    for above in axes[max(0, count - columns) : count]:
        above.tick_params(labelbottom=True)
    return figure, list(axes[:count])


def grid_of_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names along a matrix, columns above it, slanted."""
    names = [plain(name) for name in columns]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5 where it spans little, else powers of 10."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    if high < 1e4 * low:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
