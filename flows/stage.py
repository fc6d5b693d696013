"""One stage as a command, for dvc.yaml: `python -m flows.stage merge ties`."""

import sys

import click

from flows.cli import calm_down
from flows.console import start_logging
from flows.places import ARTIFACTS, PLAIN, Places
from flows.selection import find_places
from flows.steps import STAGES, run_all, steps
from flows.turns import turn
from poemerge.alone import alone
from poemerge.errors import PoemergeError, SourceError


def main(arguments: list[str]) -> int:
    """Run the steps of a stage, all of them or the one that is named; 1 if refused."""
    calm_down()
    start_logging()
    stage, *labels = arguments
    try:
        places = find_places(PLAIN)
        devices = places.params.devices if stage != STAGES[0] else ()
        # DVC has locked what a run would wait for, so a stage does not wait for the run.
        with alone(ARTIFACTS, patient=False), turn(devices):
            _run(stage, labels, places)
    except PoemergeError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    return 0


def _run(stage: str, labels: list[str], places: Places) -> None:
    if stage != STAGES[0]:
        _check_fetched(places)
    run_all([step for step in steps(stage, places) if not labels or step.label in labels])


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
