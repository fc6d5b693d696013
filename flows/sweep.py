"""`poemerge sweep`: settings found on validation, method by method; the winners shown on test."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow

from flows.candidates import Bench, Candidate, MergeError
from flows.meter import Pace
from flows.pipeline import run_stage
from flows.places import ARTIFACTS, Places
from flows.sections import Params, SweepParams
from flows.selection import find_places
from flows.steps import steps
from flows.turns import turn
from poemerge.alone import alone, clear
from poemerge.atomic import write_json
from poemerge.errors import SettingError
from poemerge.hashing import digest
from poemerge.settings import nearest
from tasks.evaluate import RESULTS
from tasks.paired import Outcomes
from tasks.sweep.runs import Run, Runs, open_runs
from tasks.sweep.search import Result, Rules, Search, State, Trial, open_storage
from tasks.sweep.space import Space
from tasks.sweep.standings import Winner, as_json, counts, rank

ROOT = Path(".poemerge/sweep")
BOARD, LOG = "sweep.json", "log.json"  # the outcome, and the seconds of each method

logger = logging.getLogger(__name__)


@flow(name="poemerge sweep")
def sweep(
    params: str = "params.yaml", overrides: Sequence[str] = (), labels: Sequence[str] = ()
) -> dict[str, Any]:
    """Search the settings of every method in `sweep.space`, and report each one's best on test.

    What was scored before is not scored again; a sweep that was stopped goes on where it was.

    Args:
        params: path of the parameter file.
        overrides: `a.b=c` settings for this sweep alone.
        labels: methods to search now, as the space names them; all of them where none is named.

    Returns:
        `folder`: where sweep.json and log.json lie; `winners`: label → settings.

    Raises:
        PoemergeError: something was refused.
    """
    places = find_places(Path(params), overrides)
    section = section_of(places.params, params, labels)
    with alone(ARTIFACTS), turn(places.params.devices):
        clear(ROOT)  # what has its scores is not come back to
        run_stage("fetch", list(steps("fetch", places)))
        with _open(places, section, tuple(labels or section.space)) as contest:
            for label in contest.asked:
                _search(label, contest)
            return _report(contest)


@dataclass(frozen=True)
class Contest:
    """A sweep at work.

    Attributes:
        folder: of its outcome.
        searches: label → search, those too that are not gone on with now.
        asked: labels that are.
    """

    bench: Bench
    runs: Runs
    folder: Path
    searches: dict[str, Search]
    asked: tuple[str, ...]
    pace: Pace = field(default_factory=Pace)

    @property
    def left(self) -> str:
        """How long it will take, by the pace up to now."""
        return self.pace.left(sum(self.searches[label].left for label in self.asked))


def section_of(params: Params, path: str, labels: Sequence[str]) -> SweepParams:
    """The section `sweep`, once it is clear that it can be done.

    Args:
        params: that have it.
        path: of their file, for the message.
        labels: methods that are asked for.

    Raises:
        SettingError: there is none, or it cannot be done.
    """
    if params.sweep is None:
        raise SettingError(f"{path} has no section sweep; docs/sweep.md shows one.")
    for label in labels:
        if label not in params.sweep.space:
            known = params.sweep.space
            raise SettingError(
                f"--method {label} is not in sweep.space{nearest(label, known)}; it has "
                f"{', '.join(known)}."
            )
    if not params.evaluate.tasks:
        raise SettingError(f"{path} has no evaluate.tasks, by which to choose; name some.")
    if params.evaluate.limit == 1:
        raise SettingError("evaluate.limit is 1, which gives no intervals; allow 2 items or more.")
    return params.sweep


@contextmanager
def _open(places: Places, section: SweepParams, asked: tuple[str, ...]) -> Iterator[Contest]:
    """Studies and runs of the sweep; both are named after all that decides what is in them."""
    rules = Rules(
        **section.model_dump(include={"sampler", "trials", "prune", "seed"}),
        tasks=len(places.params.evaluate.tasks),
    )
    bench = Bench(places, ROOT)
    spaces = {label: Space.parse(label, given) for label, given in section.space.items()}
    names = {label: _study(label, space, bench, section) for label, space in spaces.items()}
    identity = digest(list(names.values()))[:12]
    record = places.params.model_dump(by_alias=True)
    with (
        open_storage(Path(section.storage)) as storage,
        open_runs(places.params.register_.experiment, identity, record) as runs,
    ):
        searches = {
            label: Search(storage, names[label], space, rules) for label, space in spaces.items()
        }
        yield Contest(bench, runs, ROOT / identity, searches, asked)


def _study(label: str, space: Space, bench: Bench, section: SweepParams) -> str:
    """Name of a study; with more trials it is the same one, and goes on."""
    inputs = bench.key(Candidate(label, space.method, {}))
    how = section.model_dump(include={"sampler", "prune", "seed"})
    return f"{label}-{digest([inputs, section.space[label], how])[:12]}"


def _search(label: str, contest: Contest) -> None:
    """Try candidate after candidate."""
    search = contest.searches[label]
    logger.info("%s: %d of %d candidates to try", label, search.left, search.total)
    while (trial := search.ask()) is not None:
        candidate = Candidate(f"{label} {trial.number}", search.space.method, trial.settings)
        with contest.runs.candidate(
            candidate.name, "trial", candidate.method, candidate.settings
        ) as run:
            result = trial.finish(*_score(candidate, trial, contest.bench, run))
            run.end(result)
        contest.pace.add(result.seconds)
        _tell(candidate, result, search, contest.left)


def _score(candidate: Candidate, trial: Trial, bench: Bench, run: Run) -> tuple[State, str]:
    """Score task by task, to the end or until it is given up; why, where it was refused."""
    try:
        with closing(bench.validate(candidate)) as scores:
            for task, score in scores:
                run.log({f"validation/{task}": score})
                if trial.report(task, score):
                    return "pruned", ""
    except MergeError as error:
        return "refused", str(error)
    return "complete", ""


def _tell(candidate: Candidate, result: Result, search: Search, left: str) -> None:
    if result.refused:
        logger.warning("%s refused: %s", candidate.name, result.refused)
        return
    best = search.best.mean if search.best else math.nan
    logger.info(
        "%s of %d: %s, mean %.3f of %d tasks, best %.3f; %s, %s",
        *(candidate.name, search.total, result.state, result.mean, len(result.scores), best),
        *(json.dumps(candidate.settings), left),
    )


def _report(contest: Contest) -> dict[str, Any]:
    """Show the winners of all searches that are at their end on test."""
    done = {label: search for label, search in contest.searches.items() if not search.left}
    best = {label: search.best for label, search in done.items()}
    found = [_test(label, result, contest) for label, result in best.items() if result]
    if not found:
        raise SettingError(
            "No candidate could be merged; the lines above say why. Change sweep.space."
        )
    standings = rank(found)
    for standing in standings:
        contest.runs.winner(standing)
    board = as_json(standings, list(contest.bench.places.params.evaluate.tasks))
    contest.folder.mkdir(parents=True, exist_ok=True)
    write_json(contest.folder / BOARD, board)
    seconds = {label: sum(r.seconds for r in search.results) for label, search in done.items()}
    write_json(contest.folder / LOG, seconds)
    contest.runs.close(board)
    return {"folder": str(contest.folder), "winners": {w.label: w.entry for w in found}}


def _test(label: str, best: Result, contest: Contest) -> Winner:
    """The best candidate of a method, scored on test once."""
    search = contest.searches[label]
    method, settings = search.space.method, best.settings
    candidate = Candidate(f"{label}'s best", method, settings)
    key = contest.bench.key(candidate)
    tested = contest.folder / "test" / label
    scores = contest.bench.test(candidate, tested / key)
    outcomes = Outcomes.read(tested / key, list(scores), "test")
    looks = len(list(tested.glob(f"*/{RESULTS}")))
    ended = counts(search.results)
    return Winner(label, method, settings, key, best.mean, ended, scores, outcomes, looks)
