"""One stage as a command, for dvc.yaml: `python -m flows.stage merge ties`."""

import logging
import sys

from flows.cli import calm_down
from flows.places import PLAIN, Places
from flows.queue import turn
from flows.selection import find_places
from flows.steps import STAGES, steps
from poemerge.errors import PoemergeError, SourceError


def main(arguments: list[str]) -> int:
    """Run the steps of a stage, all of them or the one that is named; 1 if refused."""
    calm_down()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stage, *labels = arguments
    try:
        places = find_places(PLAIN)
        if stage != STAGES[0]:
            _check_fetched(places)
        with turn(places.params.devices if stage != STAGES[0] else ()):
            for step in steps(stage, places):
                if not labels or step.label in labels:
                    step.run()
    except PoemergeError as error:
        logging.getLogger(__name__).error("error: %s", error)  # noqa: TRY400 - one sentence, no trace
        return 1
    return 0


def _check_fetched(places: Places) -> None:
    """DVC looks at params.yaml alone, and so does not fetch what a selection has come to mean."""
    for name, folder in places.experts.items():
        if not folder.is_dir():
            raise SourceError(
                f"{folder} is not there; run `poemerge run`, or `dvc repro --force --single-item "
                f"fetch` first, if {name} was added to the library since the last run."
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
