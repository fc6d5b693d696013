"""A folder on its way from finished shards to a complete model."""

from collections.abc import Sequence
from pathlib import Path

from poemerge.lineage import Lineage
from poemerge.merging.choices import Choices
from poemerge.merging.ledger import Ledger
from poemerge.merging.plan import Plan
from poemerge.merging.shards import Shard, write_index
from poemerge.model_card import copy_side_files, write_card
from poemerge.report import MergeReport, warn
from poemerge.rules import TIED


class Assembly:
    """What belongs beside the weights, once all of these are there, wherever they were made.

    Args:
        folder: that holds the weights.
        plan: of the merge.
        choices: output, dtype.
    """

    def __init__(self, folder: Path, plan: Plan, choices: Choices) -> None:
        self.folder, self.plan, self.choices = folder, plan, choices
        self.shards: dict[str, Shard] = {}
        self.done = 0  # tensors

    def add(self, shard: Shard) -> None:
        """Take in a shard that is complete."""
        self.shards[shard.file] = shard
        self.done += len(shard.tensors)

    @property
    def spilled(self) -> list[str]:
        """Names of the tensors that a GPU had no room for."""
        return [name for _, shard in sorted(self.shards.items()) for name in shard.spilled]

    @property
    def ledger(self) -> Ledger:
        """What was done to every tensor."""
        experts = [expert.name for expert in self.plan.experts]
        done = [tensor for shard in self.shards.values() for tensor in shard.tensors]
        return Ledger(experts, self.choices.stored, done)

    def finish(self, record: Lineage, notes: Sequence[str]) -> MergeReport:
        """Write the index, the side files, the report and the model card."""
        ledger = self.ledger
        if self.choices.output == "full":
            self._write_side_files()
            for group in self.plan.groups:
                for info in group.tensors if group.rule == TIED else ():
                    ledger.note(group, info.name, info.dtype)
        report = self._report(ledger, record, notes)
        report.write(self.folder)
        write_card(self.folder, report, record)
        return report

    def _write_side_files(self) -> None:
        write_index(self.folder, self.plan, self.choices.stored)
        copy_side_files(self.plan.base.folder, self.folder, self.choices.dtype)
        if self.plan.growth is not None:
            self.plan.growth.write_side_files(self.folder)

    def _report(self, ledger: Ledger, record: Lineage, notes: Sequence[str]) -> MergeReport:
        settings = dict(record.params["settings"])
        tensors = tuple(sorted(ledger.tensors, key=lambda tensor: tensor.name))
        return MergeReport(
            method=self.plan.method.name,
            settings=settings,
            experts=tuple(ledger.experts),
            device=self.choices.device.type,
            dtype=self.choices.dtype,
            output=self.choices.output,
            tensors=tensors,
            warnings=(*notes, *warn(tensors, settings)),
        )
