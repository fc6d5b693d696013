"""The walk over tensors: read, subtract, merge, add, write."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.adapter_files import write_adapter
from poemerge.atomic import write_json
from poemerge.checkpoint import INDEX, TensorInfo
from poemerge.device import STORED
from poemerge.errors import CheckpointError, NumericalError, SettingError
from poemerge.expert_files import AdapterExpert, check_finite, is_finite
from poemerge.lineage import Lineage, Source
from poemerge.method import Call, Merged
from poemerge.methods import find
from poemerge.model_card import copy_side_files, write_card
from poemerge.plan import Group, Plan
from poemerge.report import MergeReport, TensorReport, warn
from poemerge.rules import AVERAGE, COPY, TIED, VOCABULARY
from poemerge.task_vector import LowRank, Update, stack
from poemerge.writer import ShardWriter

logger = logging.getLogger(__name__)


@dataclass
class Walk:
    """One merge under way."""

    plan: Plan
    device: torch.device
    dtype: str
    output: str
    seed: int
    progress: Callable[[int, int], None]
    tensors: list[TensorReport] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choices(self.plan, self.dtype, self.output)

    def run(self, folder: Path, lineage: Lineage) -> MergeReport:
        """Merge every shard into `folder`, then write what belongs beside the weights."""
        if self.output == "adapter":
            self._merge_adapter(folder)
        else:
            self._merge_shards(folder)
            copy_side_files(self.plan.base.folder, folder, self.dtype)
        self._check_experts()
        report = self._report(lineage)
        report.write(folder)
        write_card(folder, report, lineage)
        lineage.write(folder)
        return report

    def _merge_shards(self, folder: Path) -> None:
        stored = [g for g in self.plan.groups if g.rule != TIED]
        placed: dict[str, str] = {}
        size = 0
        for file in sorted({group.file for group in stored}):
            groups = [group for group in stored if group.file == file]
            infos = [info for group in groups for info in group.tensors]
            layout = {i.name: (i.shape, self._stored(i.dtype)) for i in infos}
            with ShardWriter(folder / file, layout) as writer:
                for name, tensor in self._merge_groups(groups):
                    writer.write(name, tensor)
            placed |= dict.fromkeys(layout, file)
            size += sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self._tied()
        if self.plan.base.index:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
            write_json(folder / INDEX, index)

    def _merge_groups(self, groups: list[Group]) -> Iterator[tuple[str, Tensor]]:
        for group in groups:
            for batch in group.batches():
                yield from self._merge_batch(batch)
                self.progress(len(self.tensors), len(self.plan.base.tensors))

    def _merge_batch(self, batch: Group) -> Iterator[tuple[str, Tensor]]:
        if batch.rule == COPY:
            for info in batch.tensors:
                self._note(batch, info.name, info.dtype)
                yield info.name, self._copy(info)
            return
        weights = [self._read_base(info.name) for info in batch.tensors]
        update = self._solve(batch, weights)
        dense = update.dense()
        for index, (info, weight) in enumerate(zip(batch.tensors, weights, strict=True)):
            merged = (weight + dense[index]).to(self._stored(info.dtype))
            self._check_result(merged, info.name)
            yield info.name, merged

    def _merge_adapter(self, folder: Path) -> None:
        factors: dict[str, LowRank] = {}
        for batch in (b for g in self.plan.groups if g.voters for b in g.batches()):
            update = self._solve(batch, [self._read_base(info.name) for info in batch.tensors])
            for index, info in enumerate(batch.tensors):
                part = update.part(index)
                factors |= {info.name: part} if isinstance(part, LowRank) else {}
            self.progress(len(self.tensors), len(self.plan.base.tensors))
        base_model = self.plan.base.config.get("_name_or_path") or self.plan.base.folder.name
        adapters = [e.adapter for e in self.plan.experts if isinstance(e, AdapterExpert)]
        dtype = STORED.get(self.dtype, torch.float32)
        write_adapter(folder, factors, adapters, dtype, str(base_model))

    def _solve(self, batch: Group, weights: list[Tensor]) -> Update:
        """The update of a batch, `strength` included, (B, *shape)."""
        updates = [
            [self.plan.experts[i].update(info, weight) for i in batch.voters]
            for info, weight in zip(batch.tensors, weights, strict=True)
        ]
        norms = [[float(update.norm()) for update in row] for row in updates]
        merged = self._apply_method(batch, updates)
        update = merged.update.scaled(self.plan.settings.strength).to(self.device, torch.float32)
        self._record(batch, norms, update, merged)
        return update

    def _apply_method(self, batch: Group, updates: list[list[Update]]) -> Merged:
        method, settings = self.plan.method, self.plan.settings
        if batch.rule == AVERAGE:
            method = find("average")
        elif batch.rule == VOCABULARY:
            settings = replace(settings, side="input")  # type: ignore[call-arg]
        names = [self.plan.experts[i].name for i in batch.voters]
        weights = [settings.weights.get(name, 1.0) for name in names]
        call = Call(
            torch.tensor(weights, dtype=torch.float64, device=self.device),
            tuple(tuple(_seed(self.seed, i.name, n) for n in names) for i in batch.tensors),
        )
        try:
            return method.merge(stack(updates), settings, call)
        except NumericalError as error:
            raise NumericalError(f"{batch.tensors[0].name}: {error}") from error

    def _record(
        self, batch: Group, norms: list[list[float]], update: Update, merged: Merged
    ) -> None:
        names = [self.plan.experts[i].name for i in batch.voters]
        for index, info in enumerate(batch.tensors):
            size = update.part(index).norm()
            for name, norm in zip(names, norms[index], strict=True):
                self.sizes[name] = self.sizes.get(name, 0.0) + norm**2
            certificate = merged.certificates[index] if merged.certificates else {}
            self._note(batch, info.name, info.dtype, (*norms[index], float(size)), certificate)

    def _note(
        self,
        batch: Group,
        name: str,
        dtype: torch.dtype,
        norms: tuple[float, ...] = (),
        certificate: Mapping[str, Any] | None = None,
    ) -> None:
        voters = tuple(self.plan.experts[i].name for i in batch.voters)
        stored = str(self._stored(dtype)).removeprefix("torch.")
        self.tensors.append(
            TensorReport(name, batch.rule, batch.shape, stored, voters, norms, certificate or {})
        )

    def _tied(self) -> None:
        for group in self.plan.groups:
            for info in group.tensors if group.rule == TIED else ():
                self._note(group, info.name, info.dtype)

    def _read_base(self, name: str) -> Tensor:
        weight = self.plan.base.read(name).to(self.device).float()
        check_finite(weight, name, f"the base ({self.plan.base.folder})")
        return weight

    def _copy(self, info: TensorInfo) -> Tensor:
        weight = self.plan.base.read(info.name)
        if not info.is_float:
            return weight
        check_finite(weight, info.name, f"the base ({self.plan.base.folder})")
        stored = weight.to(self._stored(info.dtype))
        self._check_result(stored, info.name)
        return stored

    def _check_result(self, merged: Tensor, name: str) -> None:
        if not is_finite(merged):
            raise NumericalError(
                f"{name} of the merge does not fit into {merged.dtype}; choose another `dtype`, or "
                "lower `strength`."
            )

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return STORED.get(self.dtype, dtype) if dtype.is_floating_point else dtype

    def _check_experts(self) -> None:
        for expert in self.plan.experts:
            if self.sizes.get(expert.name, 0.0) == 0.0:
                raise CheckpointError(
                    f"Expert {expert.name!r} ({expert.folder}) changes nothing, all its updates "
                    "are zero; leave it out or give the right folder."
                )

    def _report(self, lineage: Lineage) -> MergeReport:
        settings = asdict(self.plan.settings)
        tensors = tuple(sorted(self.tensors, key=lambda tensor: tensor.name))
        warnings = [*self.plan.notes, *_twins(lineage.inputs[1:]), *warn(tensors, settings)]
        for warning in warnings:
            logger.warning(warning)
        return MergeReport(
            method=self.plan.method.name,
            settings=settings,
            experts=tuple(expert.name for expert in self.plan.experts),
            device=self.device.type,
            dtype=self.dtype,
            output=self.output,
            tensors=tensors,
            warnings=tuple(warnings),
        )


def _check_choices(plan: Plan, dtype: str, output: str) -> None:
    if dtype != "source" and dtype not in STORED:
        raise SettingError(f"dtype is {dtype!r}; choose source, {', '.join(STORED)}.")
    if output not in {"full", "adapter"}:
        raise SettingError(f"output is {output!r}; choose full or adapter.")
    if output == "full":
        return
    if not plan.method.factors:
        raise SettingError(
            f"{plan.method.name} makes dense updates, which no adapter holds; choose output "
            "full, or a method that keeps factors (`poemerge methods`)."
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


def _seed(seed: int, tensor: str, expert: str) -> int:
    """A seed of its own for each draw, whatever the order of the walk."""
    text = f"{seed}\0{tensor}\0{expert}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
