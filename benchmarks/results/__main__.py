"""Measure the zoos and write docs/results.md: `python -m benchmarks.results [ZOO ...]`.

A zoo is lora-0, full-0, lora-1 or full-1; all of them take most of a day on 2 cores.
"""

import argparse
import logging

from benchmarks.results import page
from benchmarks.results.measure import Zoo, measure
from poemerge.atomic import write_json

ZOOS = [Zoo(kind, seed) for seed in (0, 1) for kind in ("lora", "full")]
LIMIT = 50


def main() -> None:
    """Measure what is asked for; the page has all that was ever measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [zoo.name for zoo in ZOOS]
    parser.add_argument("zoos", nargs="*", default=names, metavar="ZOO", help=", ".join(names))
    parser.add_argument("--limit", type=int, default=LIMIT, help="items per task and split; 0: all")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    for name in asked.zoos:
        zoo = ZOOS[names.index(name)]
        page.MEASURED.mkdir(exist_ok=True)
        write_json(page.MEASURED / f"{name}.json", measure(zoo, asked.limit or None))
        page.write()


if __name__ == "__main__":
    main()
