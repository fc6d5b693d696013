"""The head of a merge: jobs go out, shards come in; what makes them a model is written last.

Where shards are made decides no byte of them. Without a runner they are made here, in one walk;
with one, by a worker each (work.py).
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from poemerge.errors import MachineError, SettingError
from poemerge.hashing import sha256
from poemerge.lineage import Lineage
from poemerge.merging.assembly import Assembly
from poemerge.merging.findings import changes_nothing
from poemerge.merging.jobs import jobs, longest_first
from poemerge.merging.journal import Journal
from poemerge.merging.plan import Plan
from poemerge.merging.rates import NOMINAL
from poemerge.merging.shards import Shard
from poemerge.merging.walk import Walk
from poemerge.merging.work import Recipe, ShardJob
from poemerge.names import listed
from poemerge.progress import Progress
from poemerge.remote.delivery import receive
from poemerge.report import MergeReport

# Does all jobs, in any order, and calls back with every shard as soon as it is complete.
Runner = Callable[[Sequence[ShardJob], Callable[[Shard], None]], None]

logger = logging.getLogger(__name__)


class Head:
    """One merge under way.

    Args:
        recipe: of the merge.
        plan: what the recipe comes to, with its files open.
        runner: of jobs elsewhere, or None.
        progress: called with (tensors done, tensors in all).

    Raises:
        SettingError: the choices do not fit the plan or the runner.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, runner: Runner | None, progress: Progress
    ) -> None:
        if runner is not None and not recipe.choices.is_resumable:
            raise SettingError(
                "A merged adapter and draws from the posterior are made in one process; choose "
                "runner threads for them."
            )
        self.recipe, self.runner, self.progress = recipe, runner, progress
        self.walk = Walk(plan, recipe.choices)
        self.plan, self.choices = self.walk.plan, recipe.choices

    def run(self, folders: Sequence[Path], lineage: "Future[Lineage]") -> MergeReport:
        """Merge every tensor into the first of `folders`, draws from its posterior into the rest.

        Args:
            folders: to fill, one more than there are draws.
            lineage: the record of this merge, once its inputs are hashed.

        Returns:
            The report of the first.
        """
        mode, *draws = [Assembly(folder, self.plan, self.choices) for folder in folders]
        with Journal(mode.folder, lineage) as journal:
            self._keep(mode, journal)
            if self.runner is None:
                self._fill_here(mode, draws, journal)
            else:
                self._fill_elsewhere(mode, journal, self.runner)
                for shard in mode.shards.values():  # a worker of an earlier try may be late
                    _check_arrival(mode.folder, shard)
            return self._finish(mode, draws, lineage.result(), journal)

    def _keep(self, mode: Assembly, journal: Journal) -> None:
        """Take over what an earlier try finished."""
        if not self.choices.is_resumable:
            return
        for shard in journal.find(self.walk.files):
            mode.add(shard)
        if mode.shards:
            count = len(mode.shards)
            logger.info("%d shards were finished before and hold; they are kept", count)

    def _fill_here(self, mode: Assembly, draws: Sequence[Assembly], journal: Journal) -> None:
        def finished(shard: Shard) -> None:
            mode.add(shard)
            journal.note(shard)

        kept = mode.done
        outputs = [self.walk.output(mode.folder, finished)]
        # Draws are written in turn: what waits would be memory for each of them.
        outputs += [self.walk.output(draw.folder, draw.add, waiting=0) for draw in draws]
        todo = {file for file in self.walk.files if file not in mode.shards}
        self.walk.fill(outputs, todo, lambda done: self._tell(kept + done))

    def _fill_elsewhere(self, mode: Assembly, journal: Journal, runner: Runner) -> None:
        def finished(shard: Shard) -> None:
            _check_arrival(mode.folder, shard)
            mode.add(shard)
            journal.note(shard)
            self._tell(mode.done)

        todo = [job for job in jobs(self.plan) if job.file in self.walk.files]
        todo = [job for job in longest_first(todo, NOMINAL) if job.file not in mode.shards]
        runner(ShardJob.of(self.recipe, mode.folder, [job.file for job in todo]), finished)

    def _tell(self, done: int) -> None:
        self.progress(done, len(self.plan.base.tensors))

    def _finish(
        self, mode: Assembly, draws: Sequence[Assembly], record: Lineage, journal: Journal
    ) -> MergeReport:
        """Write what is no tensor; the records go last, which make the folders complete."""
        changed = mode.ledger.changed
        for expert in self.plan.experts:
            if expert.name not in changed:
                raise changes_nothing(expert.name, expert.folder)
        streamed = [i.name for group in self.plan.groups if group.streamed for i in group.tensors]
        notes = [*self.plan.notes, *_spilled(mode.spilled), *_streamed(streamed)]
        report = mode.finish(record, notes)
        for warning in report.warnings:
            logger.warning(warning)
        records = [record, *(self._record_of_draw(record, i) for i in range(len(draws)))]
        for draw, own in zip(draws, records[1:], strict=True):
            draw.finish(own, notes)
        journal.close()
        for each, own in zip((mode, *draws), records, strict=True):
            own.write(each.folder)
        return report

    def _record_of_draw(self, record: Lineage, index: int) -> Lineage:
        draws = self.choices.draws
        drawn = {"draw": index, "sampler": draws.sampler, "temperature": draws.temperature}
        return replace(record, params={**record.params, "posterior": drawn})


def _check_arrival(folder: Path, shard: Shard) -> None:
    """See that a shard is here, and as it was made.

    Raises:
        MachineError: it is not.
    """
    path = folder / shard.file
    if shard.tag:
        receive(path, shard.sha256, shard.tag)
    if not path.is_file():
        raise MachineError(
            f"A worker has made {path}, and here it is not to be seen; the folder must be one that "
            "all machines share (docs/runners.md)."
        )
    if sha256(path) != shard.sha256:
        raise MachineError(
            f"{path} is not as a worker has made it; see to the storage that both share, and run "
            "again."
        )


def _streamed(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    text = f"The experts of {listed(names, 1)} do not fit in memory together and came one by one"
    return [f"{text}, twice for each step; with a larger `memory` they would be held."]


def _spilled(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{listed(names, 1)} did not fit on the GPU and were solved on the CPU."]
