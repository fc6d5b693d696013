"""The search of one method's settings: an Optuna study that goes on where it was left.

The k-th candidate follows from the seed, k and the scores before it, and from nothing else: a
search that was stopped draws the candidate it was at once more, and ends like one that never was.
"""

import fcntl
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.event import listen
from sqlalchemy.exc import DatabaseError

from poemerge.errors import SettingError
from poemerge.hashing import digest
from tasks.sweep.space import Range, Space, Values

Sampler = Literal["grid", "random", "tpe"]
DRAWN_AT_RANDOM = 5  # candidates before TPE begins to learn from them
COMPLETE_FIRST = 3  # candidates that are scored on all tasks before any may be given up
State = Literal["complete", "pruned", "refused"]
RESULT = "result"  # attribute of a trial
STATES: Mapping[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "refused": TrialState.FAIL,
}


@dataclass(frozen=True)
class Rules:
    """How a search goes about it.

    Attributes:
        trials: candidates at most; a grid has as many as there are combinations.
        prune: True to give up a candidate that falls behind the median.
        tasks: on how many each is scored.
    """

    sampler: Sampler
    trials: int
    prune: bool
    seed: int
    tasks: int


@dataclass(frozen=True)
class Result:
    """What became of a candidate.

    Attributes:
        scores: task → score on validation, as far as it came.
        refused: why, for one that is.
        state: complete: scored on all tasks; pruned: given up; refused: it could not be merged.
    """

    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    seconds: float
    refused: str
    state: State

    @property
    def mean(self) -> float:
        """Mean score over the tasks that it came to."""
        return statistics.fmean(self.scores.values()) if self.scores else 0.0


class Trial:
    """One candidate on its way through the tasks."""

    def __init__(self, search: "Search", trial: optuna.Trial, number: int) -> None:
        self.number, self.settings = number, search.space.settings(trial.params)
        self.scores: dict[str, float] = {}
        self._study, self._tasks = search.study, search.rules.tasks
        self._trial, self._start = trial, time.perf_counter()

    def report(self, task: str, score: float) -> bool:
        """Tell a task's score; True if the candidate may be given up.

        Optuna's median pruner looks at the best value up to now, so that an easy first task would
        shield a candidate for ever. Sums of scores grow, which makes the last the best.
        """
        self.scores[task] = score
        self._trial.report(sum(self.scores.values()), len(self.scores))
        return len(self.scores) < self._tasks and self._trial.should_prune()

    def finish(self, state: State, refused: str = "") -> Result:
        """End it, and keep what became of it."""
        seconds = round(time.perf_counter() - self._start, 3)
        result = Result(self.settings, self.scores, seconds, refused, state)
        self._trial.set_user_attr(RESULT, asdict(result))
        _end(self._study, self._trial.number, result)
        return result


@contextmanager
def open_storage(path: Path) -> Iterator[RDBStorage]:
    """The SQLite file of all studies, for one process at a time.

    Raises:
        SettingError: another process is at it, or it is no file of Optuna's.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed even where it is killed
        except BlockingIOError as error:
            message = f"Another sweep is at {path}; wait for it, or set sweep.storage."
            raise SettingError(message) from error
        try:
            storage = RDBStorage(f"sqlite:///{path.resolve()}")
        except (DatabaseError, RuntimeError) as error:  # no database, or of another Optuna
            message = f"{path} cannot be used ({error.args[0]}); delete it, or set sweep.storage."
            raise SettingError(message) from error
        listen(storage.engine, "connect", _be_quick)
        storage.engine.dispose()
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _be_quick(connection: Any, _: Any) -> None:
    """A commit waits for the disk no more; nothing is lost unless the power fails."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


class Search:
    """All candidates of one method.

    Args:
        storage: where its study is kept.
        name: of the study: equal names are one search, so all that decides a score is in it.
        space: to choose from.
        rules: how.
    """

    def __init__(self, storage: BaseStorage, name: str, space: Space, rules: Rules) -> None:
        self.space, self.rules = space, rules
        pruner: BasePruner = NopPruner()
        if rules.prune:
            # A third of the tasks says little of a compromise between all of them.
            pruner = MedianPruner(COMPLETE_FIRST, n_warmup_steps=rules.tasks // 3)
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):  # the process was stopped
            _end(self.study, trial.number, _result(trial))

    @property
    def results(self) -> list[Result]:
        """Every candidate that came to an end, in order."""
        trials = self.study.get_trials(deepcopy=False)
        ended = (_result(trial) for trial in trials if trial.state.is_finished())
        return [result for result in ended if result]

    @property
    def best(self) -> Result | None:
        """The complete candidate with the best mean, the first of equals."""
        complete = [result for result in self.results if result.state == "complete"]
        return max(complete, key=lambda result: result.mean, default=None)

    @property
    def total(self) -> int:
        """How many candidates there are, at most."""
        return len(self.space.points()) if self.rules.sampler == "grid" else self.rules.trials

    @property
    def left(self) -> int:
        """How many are still to come, at most; none once a finite space is exhausted."""
        results = self.results
        seen = {digest(result.settings) for result in results}
        if self.space.is_finite and len(seen) == len(self.space.points()):
            return 0
        return max(0, self.total - len(results))

    def ask(self) -> Trial | None:
        """The next candidate, or None where there is none."""
        if not self.left:
            return None
        number = len(self.results)
        self.study.sampler = self._sampler(number)
        if self.rules.sampler == "grid" and not self.study.get_trials(states=[TrialState.WAITING]):
            self.study.enqueue_trial(self.space.points()[number])
        trial = self.study.ask(self._distributions)
        return Trial(self, trial, number + 1)

    def _sampler(self, number: int) -> BaseSampler:
        seed = int(digest([self.rules.seed, number])[:8], 16)
        if self.rules.sampler == "tpe":
            return TPESampler(n_startup_trials=DRAWN_AT_RANDOM, seed=seed)
        return RandomSampler(seed)

    @property
    def _distributions(self) -> dict[str, BaseDistribution]:
        return {name: _distribution(domain) for name, domain in self.space.domains.items()}


def _distribution(domain: Values | Range) -> BaseDistribution:
    if isinstance(domain, Values):
        return CategoricalDistribution(list(domain.values))
    if domain.whole:
        step = int(domain.step or 1)
        return IntDistribution(int(domain.low), int(domain.high), domain.log, step)
    return FloatDistribution(domain.low, domain.high, domain.log, domain.step)


def _result(trial: FrozenTrial) -> Result | None:
    """What a trial came to; None where it did not."""
    said = trial.user_attrs.get(RESULT)
    return Result(**said) if said else None


def _end(study: optuna.Study, number: int, result: Result | None) -> None:
    """Tell Optuna of a trial's end; one without a result failed, and counts for nothing."""
    state = STATES[result.state] if result else TrialState.FAIL
    value = result.mean if result and result.state == "complete" else None
    study.tell(number, value, state=state)
