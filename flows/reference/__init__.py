"""docs/reference/, from the code: `python -m flows.reference` writes it, a test compares it."""

from pathlib import Path

from flows.reference import commands, methods, parameters

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


def pages() -> dict[str, str]:
    """File name → page: the commands, the keys of params.yaml, the methods' settings."""
    made = {"commands.md": commands.page, "params.md": parameters.page, "methods.md": methods.page}
    return {name: page() for name, page in made.items()}
