"""Weights under way into a folder: of the merged model itself, or of a draw from its posterior."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.adapter_files import write_adapter
from poemerge.device import STORED
from poemerge.experts.adapted import AdapterExpert
from poemerge.hashing import sha256
from poemerge.layout import ADAPTER
from poemerge.merging.choices import Choices
from poemerge.merging.groups import Batch
from poemerge.merging.ledger import Ledger
from poemerge.merging.loader import Loaded
from poemerge.merging.plan import Plan
from poemerge.merging.shards import Shard, Shards
from poemerge.report import TensorReport
from poemerge.tensor_files import TensorInfo
from poemerge.truncate import best_rank
from poemerge.update import Dense, LowRank, Update


class Output:
    """What is written into one folder, and the ledger of it; use as a context.

    Args:
        folder: to fill.
        plan: of the merge.
        choices: output, dtype, rank.
        finished: called with every file of weights that is complete, by the thread that writes.
        spilled: names of the tensors that the GPU had no room for, up to now.
        waiting: tensors that may wait to be written.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        choices: Choices,
        *,
        finished: Callable[[Shard], None],
        spilled: Sequence[str],
        waiting: int,
    ) -> None:
        self.folder, self.plan, self.choices = folder, plan, choices
        self._finished, self._spilled = finished, spilled
        self.ledger = Ledger([expert.name for expert in plan.experts], choices.stored)
        self._factors: dict[str, LowRank] = {}
        self._shards = None
        if choices.output == "full":
            self._shards = Shards(folder, plan, choices.stored, waiting, self._note)

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

    def _note(self, file: str) -> None:
        infos = self.plan.base.tensors
        self._tell(file, [own for own in self.ledger.tensors if infos[own.name].file == file])

    def _tell(self, file: str, tensors: Sequence[TensorReport]) -> None:
        names = {tensor.name for tensor in tensors}
        spilled = tuple(name for name in self._spilled if name in names)
        self._finished(Shard(file, sha256(self.folder / file), tuple(tensors), spilled))

    def _write_adapter(self) -> None:
        base_model = self.plan.base.config.get("_name_or_path") or self.plan.base.folder.name
        adapters = [e.adapter for e in self.plan.experts if isinstance(e, AdapterExpert)]
        dtype = STORED.get(self.choices.dtype, torch.float32)
        tasks = {adapter.lora.task for adapter in adapters}
        task = tasks.pop() if len(tasks) == 1 else None
        write_adapter(self.folder, self._factors, adapters, dtype, str(base_model), task=task)

    def __enter__(self) -> Self:
        if self._shards is not None:
            self._shards.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._shards is not None:
            self._shards.__exit__(kind, *rest)
        elif kind is None:
            self._write_adapter()
            self._tell(ADAPTER, self.ledger.tensors)


def _square(update: Update) -> Tensor:
    """||M||² (B,), in fp64."""
    if isinstance(update, Dense):
        return linalg.square_norm(update.delta.reshape(len(update.delta), -1))
    return update.norm().square()
