"""A benchmark of several parts, each with a folder of its own; `--only` picks one."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


def run_parts(doc: str | None, *parts: Callable[[Path], None]) -> None:
    """Measure all parts, or the one that the command line names.

    Args:
        doc: of the benchmark; its first line is told by `--help`.
        parts: by whose names they are picked.
    """
    named = {part.__name__: part for part in parts}
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--only", choices=named, help="one part")
    only = parser.parse_args().only
    for name, part in named.items():
        if only in {None, name}:
            with TemporaryDirectory() as folder:
                part(Path(folder))
