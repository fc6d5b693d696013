"""A folder under way: the merged model itself, or a draw from its posterior."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.adapter_files import write_adapter
from poemerge.checkpoint import TensorInfo
from poemerge.device import STORED
from poemerge.expert_files import AdapterExpert
from poemerge.lineage import Lineage
from poemerge.merging.choices import Choices
from poemerge.merging.groups import Batch
from poemerge.merging.ledger import Ledger
from poemerge.merging.loader import Loaded
from poemerge.merging.plan import Plan
from poemerge.merging.shards import Shards
from poemerge.model_card import copy_side_files, write_card
from poemerge.report import MergeReport, warn
from poemerge.rules import TIED
from poemerge.task_vector import Dense, LowRank, Update
from poemerge.truncate import best_rank


class Output:
    """What is written into one folder, and the ledger of it; use as a context.

    Args:
        folder: to fill.
        plan: of the merge.
        choices: output, dtype, rank.
        waiting: tensors that may wait to be written.
    """

    def __init__(self, folder: Path, plan: Plan, choices: Choices, waiting: int) -> None:
        self.folder, self.plan, self.choices = folder, plan, choices
        self.ledger = Ledger([expert.name for expert in plan.experts], choices.stored)
        self._factors: dict[str, LowRank] = {}
        self._shards = None
        if choices.output == "full":
            self._shards = Shards(folder, plan, choices.stored, waiting)

    def copy(self, batch: Batch, weights: Sequence[Tensor]) -> None:
        """Take over weights of the base as they are stored."""
        self.ledger.add(batch, torch.zeros(len(batch.tensors), 0))
        self._write(batch, weights)

    def add(
        self,
        batch: Batch,
        loaded: Loaded,
        update: Update,
        certificates: Sequence[Mapping[str, Any]],
        *,
        spare: bool,
    ) -> None:
        """Scale and truncate an update (B, *shape), note it and write it.

        Args:
            batch: what was merged.
            loaded: base weights and the experts' norms.
            update: of the batch, before `strength`.
            certificates: of the batch, one a tensor, or none.
            spare: True if the base weights are used again after this.
        """
        update = update.scaled(self.plan.settings.strength)
        errors: list[float] = []
        if self.choices.rank is not None:
            update, missed = best_rank(update, self.choices.rank)
            errors = missed.tolist()
        update = update.to(update.device, torch.float32)
        squares = torch.cat([loaded.squares.cpu(), _square(update).unsqueeze(-1).cpu()], dim=-1)
        self.ledger.add(batch, squares, certificates, errors)
        if self._shards is None:
            assert isinstance(update, LowRank)
            self._factors |= {info.name: update.part(i) for i, info in enumerate(batch.tensors)}
            return
        assert isinstance(loaded.base, Tensor)
        base = loaded.base.clone() if spare else loaded.base
        self._write(batch, base.to(update.device).add_(update.dense()).unbind())

    def finish(self, record: Lineage, notes: Sequence[str]) -> MergeReport:
        """Write what belongs beside the weights, once these are complete."""
        if self.choices.output == "adapter":
            self._write_adapter()
        else:
            copy_side_files(self.plan.base.folder, self.folder, self.choices.dtype)
            if self.plan.growth is not None:
                self.plan.growth.write_side_files(self.folder)
            for group in self.plan.groups:
                for info in group.tensors if group.rule == TIED else ():
                    self.ledger.note(group, info.name, info.dtype)
        report = self._report(record, notes)
        report.write(self.folder)
        write_card(self.folder, report, record)
        record.write(self.folder)
        return report

    def _write(self, batch: Batch, weights: Sequence[Tensor]) -> None:
        if self._shards is None:
            return
        row = batch.rows[0] if batch.rows else 0
        for info, tensor in zip(batch.tensors, weights, strict=True):
            self._shards.write(info, tensor, row)
            if batch.is_last:
                self._write_new_rows(info)

    def _write_new_rows(self, info: TensorInfo) -> None:
        """Those of tokens that the base lacks; some may lie in what it keeps spare."""
        growth = self.plan.growth
        if self._shards is not None and growth is not None and info.name in growth.tensors:
            rows = growth.rows(info, self.plan.experts, self.plan.settings)
            self._shards.write(info, rows, growth.first)

    def _write_adapter(self) -> None:
        base_model = self.plan.base.config.get("_name_or_path") or self.plan.base.folder.name
        adapters = [e.adapter for e in self.plan.experts if isinstance(e, AdapterExpert)]
        dtype = STORED.get(self.choices.dtype, torch.float32)
        tasks = {adapter.lora.task for adapter in adapters}
        task = tasks.pop() if len(tasks) == 1 else None
        write_adapter(self.folder, self._factors, adapters, dtype, str(base_model), task=task)

    def _report(self, record: Lineage, notes: Sequence[str]) -> MergeReport:
        settings = dict(record.params["settings"])
        tensors = tuple(sorted(self.ledger.tensors, key=lambda tensor: tensor.name))
        return MergeReport(
            method=self.plan.method.name,
            settings=settings,
            experts=tuple(expert.name for expert in self.plan.experts),
            device=self.choices.device.type,
            dtype=self.choices.dtype,
            output=self.choices.output,
            tensors=tensors,
            warnings=(*notes, *warn(tensors, settings)),
        )

    def __enter__(self) -> Self:
        if self._shards is not None:
            self._shards.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._shards is not None:
            self._shards.__exit__(kind, *rest)


def _square(update: Update) -> Tensor:
    """||M||² (B,), in fp64."""
    if isinstance(update, Dense):
        return linalg.square_norm(update.delta.reshape(len(update.delta), -1))
    return update.norm().square()
