"""The walk over tensors: read, subtract, merge, add, write."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from poemerge.lineage import Lineage
from poemerge.merging.apply import Applier
from poemerge.merging.choices import Choices, check_choices
from poemerge.merging.findings import changes_nothing
from poemerge.merging.groups import Batch
from poemerge.merging.loader import Loaded, Loader
from poemerge.merging.memory import give_back
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
        self.plan, self.choices, self.progress = plan, choices, progress
        draws = choices.draws
        self.limit = plan.limit(choices.device, choices.memory, sampled=draws.count > 0)
        self.applier = Applier(plan, choices.seed, choices.device, draws)

    def run(self, folders: Sequence[Path], lineage: Callable[[], Lineage]) -> MergeReport:
        """Merge every tensor into the first of `folders`, draws from its posterior into the rest.

        Args:
            folders: to fill, one more than there are draws.
            lineage: gives the record of this merge, once its inputs are hashed.

        Returns:
            The report of the first.
        """
        # Draws are written in turn: what waits would be memory for each of them.
        outputs = [
            Output(folder, self.plan, self.choices, waiting=0 if index else BEHIND)
            for index, folder in enumerate(folders)
        ]
        with ExitStack() as stack, closing(self.batches()) as batches:
            for output in outputs:
                stack.enter_context(output)
            for batch, loaded in batches:
                self._merge(batch, loaded, outputs)
                self.progress(len(outputs[0].ledger.tensors), len(self.plan.base.tensors))
        self._check_experts(outputs[0])
        record = lineage()
        notes = [*self.plan.notes, *_spilled(self.applier.spilled)]
        report = outputs[0].finish(record, notes)
        for warning in report.warnings:
            logger.warning(warning)
        for index, output in enumerate(outputs[1:]):
            output.finish(self._record_of_draw(record, index), notes)
        return report

    def batches(self) -> Generator[tuple[Batch, Loaded], None, None]:
        """All batches, file by file, each loaded while the one before is solved."""
        adapter = self.choices.output == "adapter"
        loader = Loader(self.plan, self.choices.device, with_base=not adapter)
        groups = [g for g in self.plan.groups if g.rule != TIED and (g.voters or not adapter)]
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
            if output.ledger.changed.get(expert.name, 0.0) == 0.0:
                raise changes_nothing(expert.name, expert.folder)


def _spilled(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more} did not fit on the GPU and were solved on the CPU."]
