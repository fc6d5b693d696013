"""Measure the zoos and write docs/results.md: `python -m benchmarks.results [ZOO ...]`.

A zoo is lora-0, full-0, lora-1 or full-1; all of them take most of a day on 2 cores.
"""

import argparse

from benchmarks.results import page
from flows.cli import calm_down
from poemerge.atomic import write_json

KINDS, SEEDS = ("lora", "full"), (0, 1)
LIMIT = 50


def main() -> None:
    """Measure what is asked for; the page has all that was ever measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    zoos = {f"{kind}-{seed}": (kind, seed) for seed in SEEDS for kind in KINDS}
    parser.add_argument("zoos", nargs="*", default=list(zoos), metavar="ZOO", help=", ".join(zoos))
    parser.add_argument("--limit", type=int, default=LIMIT, help="items per task and split; 0: all")
    asked = parser.parse_args()
    calm_down()
    from benchmarks.results.measure import Zoo, measure  # noqa: PLC0415 - Prefect, once it is calm
    from flows.console import start_logging  # noqa: PLC0415

    start_logging()
    page.MEASURED.mkdir(exist_ok=True)
    for name in asked.zoos:
        for facts in measure(Zoo(*zoos[name]), asked.limit or None):
            write_json(page.MEASURED / f"{name}.json", facts)
            page.write()


if __name__ == "__main__":
    main()
