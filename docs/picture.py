"""docs/demo.svg, the README's picture: what `make demo` shows at its end. Run after `make demo`."""

import re
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from flows import outcome_table
from flows.params import load
from flows.places import Places

PICTURE = Path(__file__).with_name("demo.svg")
WIDTH = 150  # columns


def draw() -> None:
    """Read the outputs of the last plain run and draw them as a terminal would."""
    params = load(Path("params.yaml"))
    places = Places(params, params)
    outcome_table.console = Console(record=True, width=WIDTH)
    outcome_table.show_outcome(places.outcome(made=[]))
    frame = re.sub(
        r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
    )  # no web fonts
    outcome_table.console.save_svg(str(PICTURE), title="make demo", code_format=frame)


if __name__ == "__main__":
    draw()
