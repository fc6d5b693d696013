"""The walk over tensors: read, subtract, merge, add, write."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from poemerge import linalg
from poemerge.adapter_files import write_adapter
from poemerge.device import STORED
from poemerge.errors import CheckpointError, SettingError
from poemerge.expert_files import AdapterExpert
from poemerge.lineage import Lineage, Source
from poemerge.merging.apply import Applier
from poemerge.merging.groups import Batch
from poemerge.merging.ledger import Ledger
from poemerge.merging.loader import Loaded, Loader
from poemerge.merging.memory import give_back
from poemerge.merging.plan import Plan
from poemerge.merging.shards import Shards
from poemerge.merging.stream import ahead
from poemerge.model_card import copy_side_files, write_card
from poemerge.progress import Progress
from poemerge.report import MergeReport, warn
from poemerge.rules import COPY, TIED
from poemerge.task_vector import Dense, LowRank, Update
from poemerge.truncate import best_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choices:
    """What a merge is asked for beside its method.

    Attributes:
        device: where to solve.
        dtype: to store: `source`, `float32`, `bfloat16` or `float16`.
        output: `full` or `adapter`.
        seed: of methods that draw at random.
        rank: to which a merged adapter is truncated, or None.
        memory: budget in bytes, or None.
    """

    device: torch.device
    dtype: str
    output: str
    seed: int
    rank: int | None = None
    memory: int | None = None

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of the base's dtype is stored."""
        return STORED.get(self.dtype, dtype) if dtype.is_floating_point else dtype


class Walk:
    """One merge under way.

    Args:
        plan: with its files open.
        choices: device, dtype, output, seed, rank, memory.
        progress: called with (tensors done, tensors in all).

    Raises:
        SettingError: the choices do not fit the plan.
    """

    def __init__(self, plan: Plan, choices: Choices, progress: Progress) -> None:
        _check_choices(plan, choices)
        self.plan, self.choices, self.progress = plan, choices, progress
        self.limit = plan.limit(choices.device, choices.memory)
        self.applier = Applier(plan, choices.seed, choices.device)
        self.ledger = Ledger([expert.name for expert in plan.experts], choices.stored)

    def run(self, folder: Path, lineage: Callable[[], Lineage]) -> MergeReport:
        """Merge every tensor into `folder`, then write what belongs beside the weights.

        Args:
            folder: to fill.
            lineage: gives the record of this merge, once its inputs are hashed.
        """
        if self.choices.output == "adapter":
            self._write_adapter(folder)
        else:
            self._write_shards(folder)
            copy_side_files(self.plan.base.folder, folder, self.choices.dtype)
        self._check_experts()
        record = lineage()
        report = self._report(record)
        report.write(folder)
        write_card(folder, report, record)
        record.write(folder)
        return report

    def _write_shards(self, folder: Path) -> None:
        shards = Shards(folder, self.plan, self.choices.stored)
        with shards, closing(self._batches()) as batches:
            for batch, loaded in batches:
                self._write_batch(shards, batch, loaded)
        for group in self.plan.groups:
            for info in group.tensors if group.rule == TIED else ():
                self.ledger.note(group, info.name, info.dtype)

    def _write_batch(self, shards: Shards, batch: Batch, loaded: Loaded) -> None:
        row = batch.rows[0] if batch.rows else 0
        for info, tensor in zip(batch.tensors, self._merged(batch, loaded), strict=True):
            shards.write(info, tensor, row)

    def _merged(self, batch: Batch, loaded: Loaded) -> Sequence[torch.Tensor]:
        """The merged weights of a batch, in fp32; what is copied stays as it is."""
        if batch.group.rule == COPY:
            self.ledger.add(batch, torch.zeros(len(batch.tensors), 0))
            return tuple(loaded.base)
        update = self._solve(batch, loaded)
        assert isinstance(loaded.base, torch.Tensor)
        return loaded.base.to(update.device).add_(update.dense()).unbind()

    def _write_adapter(self, folder: Path) -> None:
        factors: dict[str, LowRank] = {}
        with closing(self._batches()) as batches:
            for batch, loaded in batches:
                update = self._solve(batch, loaded)
                assert isinstance(update, LowRank)
                factors |= {info.name: update.part(i) for i, info in enumerate(batch.tensors)}
        base_model = self.plan.base.config.get("_name_or_path") or self.plan.base.folder.name
        adapters = [e.adapter for e in self.plan.experts if isinstance(e, AdapterExpert)]
        dtype = STORED.get(self.choices.dtype, torch.float32)
        tasks = {adapter.lora.task for adapter in adapters}
        task = tasks.pop() if len(tasks) == 1 else None
        write_adapter(folder, factors, adapters, dtype, str(base_model), task=task)

    def _batches(self) -> Generator[tuple[Batch, Loaded], None, None]:
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
            self.progress(len(self.ledger.tensors), len(self.plan.base.tensors))

    def _is_small(self, batch: Batch) -> bool:
        """False for what is larger than a batch should be: two of those would be too much."""
        return len(batch.tensors) * batch.as_group.loaded_bytes <= self.limit

    def _solve(self, batch: Batch, loaded: Loaded) -> Update:
        """The update of a batch, `strength` included, (B, *shape); noted in the ledger."""
        merged = self.applier.merge(batch, loaded)
        update = merged.update.scaled(self.plan.settings.strength)
        errors: list[float] = []
        if self.choices.rank is not None:
            update, missed = best_rank(update, self.choices.rank)
            errors = missed.tolist()
        update = update.to(update.device, torch.float32)
        squares = torch.cat([loaded.squares.cpu(), _square(update).unsqueeze(-1).cpu()], dim=-1)
        self.ledger.add(batch, squares, merged.certificates, errors)
        return update

    def _check_experts(self) -> None:
        for expert in self.plan.experts:
            if self.ledger.changed.get(expert.name, 0.0) == 0.0:
                raise CheckpointError(
                    f"Expert {expert.name!r} ({expert.folder}) changes nothing, all its updates "
                    "are zero; leave it out or give the right folder."
                )

    def _report(self, lineage: Lineage) -> MergeReport:
        settings = dict(lineage.params["settings"])
        tensors = tuple(sorted(self.ledger.tensors, key=lambda tensor: tensor.name))
        found = [
            *_twins(lineage.inputs[1 : 1 + len(self.plan.experts)]),
            *_spilled(self.applier.spilled),
        ]
        warnings = [*self.plan.notes, *found, *warn(tensors, settings)]
        for warning in warnings:
            logger.warning(warning)
        return MergeReport(
            method=self.plan.method.name,
            settings=settings,
            experts=tuple(expert.name for expert in self.plan.experts),
            device=self.choices.device.type,
            dtype=self.choices.dtype,
            output=self.choices.output,
            tensors=tensors,
            warnings=tuple(warnings),
        )


def _square(update: Update) -> torch.Tensor:
    """||M||² (B,), in fp64."""
    if isinstance(update, Dense):
        return linalg.square_norm(update.delta.reshape(len(update.delta), -1))
    return update.norm().square()


def _check_choices(plan: Plan, choices: Choices) -> None:
    if choices.dtype != "source" and choices.dtype not in STORED:
        raise SettingError(f"dtype is {choices.dtype!r}; choose source, {', '.join(STORED)}.")
    if choices.output not in {"full", "adapter"}:
        raise SettingError(f"output is {choices.output!r}; choose full or adapter.")
    if choices.rank is not None and (choices.rank < 1 or choices.output == "full"):
        raise SettingError(
            f"rank is {choices.rank}; it is the rank of a merged adapter: choose 1 or more, and "
            "output adapter."
        )
    if choices.output == "full":
        return
    if not plan.method.factors(plan.settings):
        raise SettingError(
            f"{plan.method.name} makes dense updates with these settings, which no adapter holds; "
            "choose output full, or a method that keeps factors (`poemerge methods`)."
        )
    dense = [i.name for g in plan.groups if g.voters and not g.in_factors for i in g.tensors]
    if dense:
        raise SettingError(
            f"{dense[0]} has a dense update, which no adapter holds; choose output full, or give "
            "adapters only."
        )


def _twins(experts: Sequence[Source]) -> list[str]:
    """Warnings on experts whose weight files are the same bytes."""
    seen: dict[tuple[str, ...], str] = {}
    warnings = []
    for expert in experts:
        weights = tuple(h for f, h in sorted(expert.files.items()) if f.endswith(".safetensors"))
        if weights in seen:
            warnings.append(
                f"Experts {seen[weights]!r} and {expert.name!r} are the same bytes and count "
                "twice; leave one out if that is not meant."
            )
        seen.setdefault(weights, expert.name)
    return warnings


def _spilled(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more} did not fit on the GPU and were solved on the CPU."]
