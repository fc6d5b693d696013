"""The walk over tensors: read, subtract, merge, add, write."""

import logging
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from poemerge.lineage import Lineage
from poemerge.merging.apply import Applier
from poemerge.merging.choices import Choices, check_choices
from poemerge.merging.findings import changes_nothing
from poemerge.merging.groups import Batch
from poemerge.merging.journal import Journal
from poemerge.merging.loader import Loaded, Loader
from poemerge.merging.memory import give_back, shortages
from poemerge.merging.output import Output
from poemerge.merging.plan import Plan
from poemerge.merging.stream import BEHIND, ahead
from poemerge.progress import Progress
from poemerge.report import MergeReport
from poemerge.rules import COPY, TIED

logger = logging.getLogger(__name__)


class Walk:
    """One merge under way.

    Args:
        plan: with its files open.
        choices: device, dtype, output, seed, rank, memory, draws.
        progress: called with (tensors done, tensors in all).

    Raises:
        SettingError: the choices do not fit the plan.
    """

    def __init__(self, plan: Plan, choices: Choices, progress: Progress) -> None:
        check_choices(plan, choices)
        draws = choices.draws
        if not draws.count:  # a draw pulls at all experts at once
            plan = plan.fitted(choices.device, choices.memory)
        self.plan, self.choices, self.progress = plan, choices, progress
        self.limit = plan.limit(choices.device, choices.memory, sampled=draws.count > 0)
        self.applier = Applier(plan, choices.seed, choices.device, draws)

    def run(self, folders: Sequence[Path], lineage: "Future[Lineage]") -> MergeReport:
        """Merge every tensor into the first of `folders`, draws from its posterior into the rest.

        Args:
            folders: to fill, one more than there are draws.
            lineage: the record of this merge, once its inputs are hashed.

        Returns:
            The report of the first.
        """
        with Journal(folders[0], lineage, self.applier.spilled) as journal:
            mode = Output(folders[0], self.plan, self.choices, BEHIND, journal)
            # Draws are written in turn: what waits would be memory for each of them.
            draws = [Output(folder, self.plan, self.choices, waiting=0) for folder in folders[1:]]
            self._fill([mode, *draws], without=mode.take_over())
            return self._finish(mode, draws, lineage.result())

    def _fill(self, outputs: Sequence[Output], without: Collection[str]) -> None:
        """Merge tensor by tensor.

        Args:
            outputs: the mode's, and those of draws.
            without: shards that are there already.
        """
        if without:
            logger.info("%d shards were finished before and hold; they are kept", len(without))
        with ExitStack() as stack, closing(self.batches(without)) as batches:
            for output in outputs:
                stack.enter_context(output)
            for batch, loaded in batches:
                with shortages(batch.tensors[0].name):
                    self._merge(batch, loaded, outputs)
                self.progress(len(outputs[0].ledger.tensors), len(self.plan.base.tensors))

    def _finish(self, mode: Output, draws: Sequence[Output], record: Lineage) -> MergeReport:
        """Write what is no tensor."""
        self._check_experts(mode)
        notes = [
            *self.plan.notes,
            *_spilled(self.applier.spilled),
            *_streamed([i.name for g in self.plan.groups if g.streamed for i in g.tensors]),
        ]
        report = mode.finish(record, notes)
        for warning in report.warnings:
            logger.warning(warning)
        for index, output in enumerate(draws):
            output.finish(self._record_of_draw(record, index), notes)
        return report

    def batches(self, without: Collection[str] = ()) -> Generator[tuple[Batch, Loaded], None, None]:
        """All batches, file by file, each loaded while the one before is solved.

        Args:
            without: files to leave out.
        """
        adapter = self.choices.output == "adapter"
        loader = Loader(self.plan, self.choices.device, with_base=not adapter)
        groups = [g for g in self.plan.groups if g.rule != TIED and g.file not in without]
        groups = [group for group in groups if group.voters or not adapter]
        local = self.plan.method.local and not adapter
        batches = (
            batch
            for group in sorted(groups, key=lambda group: group.file)
            for batch in group.batches(self.limit, local=local)
        )
        for batch, loaded in ahead(loader.load, batches, eager=self._is_small):
            loaded.wait()
            yield batch, loaded
            loaded.release()
            if not self._is_small(batch):
                give_back()

    def _is_small(self, batch: Batch) -> bool:
        """False for what is larger than a batch should be: two of those would be too much."""
        return len(batch.tensors) * batch.as_group.loaded_bytes <= self.limit

    def _merge(self, batch: Batch, loaded: Loaded, outputs: Sequence[Output]) -> None:
        """One batch: its mode goes to the first output, and a draw to each other."""
        mode, *draws = outputs
        if batch.group.rule == COPY:
            for output in outputs:
                output.copy(batch, tuple(loaded.base))
            return
        merged = self.applier.merge(batch, loaded)
        mode.add(batch, loaded, merged.update, merged.certificates, spare=bool(draws))
        for output in draws:
            update, facts = merged.draw()
            output.add(batch, loaded, update, facts, spare=output is not draws[-1])

    def _record_of_draw(self, record: Lineage, index: int) -> Lineage:
        draws = self.choices.draws
        drawn = {"draw": index, "sampler": draws.sampler, "temperature": draws.temperature}
        return replace(record, params={**record.params, "posterior": drawn})

    def _check_experts(self, output: Output) -> None:
        for expert in self.plan.experts:
            if expert.name not in output.ledger.changed:
                raise changes_nothing(expert.name, expert.folder)


def _streamed(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    text = f"The experts of {_some(names)} do not fit in memory together and came one by one"
    return [f"{text}, twice for each step."]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _spilled(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{_some(names)} did not fit on the GPU and were solved on the CPU."]
