"""One stage as a command, for dvc.yaml: `python -m flows.stage merge ties`."""

import logging
import sys

from flows.cli import calm_down
from flows.places import PLAIN
from flows.selection import find_places
from flows.steps import steps
from poemerge.errors import PoemergeError


def main(arguments: list[str]) -> int:
    """Run the steps of a stage, all of them or the one that is named; 1 if refused."""
    calm_down()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stage, *labels = arguments
    try:
        for step in steps(stage, find_places(PLAIN)):
            if not labels or step.label in labels:
                step.run()
    except PoemergeError as error:
        logging.getLogger(__name__).error("error: %s", error)  # noqa: TRY400 - one sentence, no trace
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
