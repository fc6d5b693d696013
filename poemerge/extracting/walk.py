"""The walk of an extraction: read, subtract, truncate, write."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from poemerge.adapter_files import Whole, write_adapter
from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError, NumericalError
from poemerge.experts import Expert
from poemerge.experts.values import check_finite, is_finite
from poemerge.extracting.card import write_card
from poemerge.extracting.report import ExtractReport, TensorOutcome, lacking, losses
from poemerge.extracting.rules import (
    DROPPED,
    FACTORS,
    SAVED_WITH,
    UNTOUCHED,
    WHOLE,
    Policy,
    is_table,
    is_transposed,
    module_of,
    obstacle,
    peft_task,
)
from poemerge.layout import ADAPTER
from poemerge.lineage import Lineage, Source
from poemerge.progress import Progress
from poemerge.rules import is_head, is_tied_head, is_vocabulary
from poemerge.tensor_files import TensorInfo
from poemerge.truncate import best_rank, relative_error
from poemerge.update import LowRank, Update

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"  # of a tied model that stores no head
INTEGERS = "integers are not fine-tuned"
TIED = "tied to the input embedding, with which it moves"
LACKING = "not in the expert"


@dataclass
class Extraction:
    """One extraction under way; only the factors are held."""

    base: Checkpoint
    expert: Expert
    policy: Policy
    rank: int
    svd: str
    dtype: torch.dtype
    device: torch.device
    factors: dict[str, LowRank] = field(default_factory=dict)
    outcomes: dict[str, TensorOutcome] = field(default_factory=dict)

    def run(self, folder: Path, lineage: Lineage, progress: Progress) -> ExtractReport:
        """Truncate every update, then write the adapter and what belongs beside it."""
        for name, info in self.base.tensors.items():
            self.outcomes[name] = self._visit(info)
            progress(len(self.outcomes), len(self.base.tensors))
        self._check_factors()
        self._drop_what_has_no_place()
        base_model = _base_model(lineage.inputs[0], self.base)
        whole = self._whole()
        write_adapter(
            folder,
            self.factors,
            (),
            self.dtype,
            base_model,
            embeddings={name for name in self.factors if is_table(name)},
            transposed=is_transposed(self.base),
            whole=whole,
            tied=self.base.ties_embeddings and any(is_head(name) for name in whole),
            task=peft_task(self.base),
        )
        report = self._report(folder, lineage, base_model)
        report.write(folder)
        write_card(folder, report)
        lineage.write(folder)
        return report

    def _visit(self, info: TensorInfo) -> TensorOutcome:
        """Decide on one tensor; where it goes into factors, make them."""
        outcome = TensorOutcome(info.name, info.shape, UNTOUCHED)
        if not info.is_float:
            return replace(outcome, reason=INTEGERS)
        if is_tied_head(info, self.base):
            return replace(outcome, reason=TIED)
        if not self.expert.votes(info):
            return replace(outcome, reason=LACKING)
        _, update = self._read(info)
        if not bool(update.dense().any()):
            return outcome
        done, reason = self.policy.verdict(info, self.base)
        moved = replace(outcome, done=done, norm=float(update.norm()), reason=reason)
        if done == FACTORS:
            factors, error = self._truncate(info.name, update)
            self.factors[info.name] = factors
            return replace(moved, rank=factors.rank, error=error)
        return replace(moved, error=1.0 if done == DROPPED else 0.0)

    def _read(self, info: TensorInfo) -> tuple[Tensor, Update]:
        """The base's weight and what fine-tuning changed, both in fp32 and finite."""
        start = self.base.read(info.name).to(self.device).float()
        check_finite(start, info.name, f"the base ({self.base.folder})")
        return start, self.expert.update(info, start)

    def _truncate(self, name: str, update: Update) -> tuple[LowRank, float]:
        """Factors as they are stored, and their error, that of a narrow dtype included."""
        factors, error = best_rank(update, self.rank, svd=self.svd)
        stored = factors.to(self.device, self.dtype)
        if not (is_finite(stored.up) and is_finite(stored.down)):
            raise _too_narrow(name, self.dtype)
        if self.dtype != torch.float32:
            error = relative_error(update, stored)
        return stored.to(torch.device("cpu"), self.dtype), float(error)

    def _check_factors(self) -> None:
        """An adapter without any factor is none: PEFT would not load it."""
        if self.factors:
            return
        moved = [outcome.name for outcome in self.outcomes.values() if outcome.done != UNTOUCHED]
        if not moved:
            raise CheckpointError(
                f"Expert {self.expert.name!r} ({self.expert.folder}) equals the base; give the "
                "fine-tuned checkpoint."
            )
        raise CheckpointError(
            f"Expert {self.expert.name!r} ({self.expert.folder}) changes no matrix that would go "
            f"into factors, only {moved[0]} and the like; give another `vocabulary`, or use the "
            "full checkpoint."
        )

    def _drop_what_has_no_place(self) -> None:
        done = {name: outcome.done for name, outcome in self.outcomes.items()}
        for name in (name for name, what in done.items() if what == WHOLE):
            if reason := obstacle(name, self.base, done):
                outcome = self.outcomes[name]
                self.outcomes[name] = replace(outcome, done=DROPPED, error=1.0, reason=reason)

    def _whole(self) -> dict[str, Whole]:
        """Every tensor of the modules that are kept whole, to be read when written."""
        kept = {name for name, outcome in self.outcomes.items() if outcome.done == WHOLE}
        whole: dict[str, Whole] = {}
        for name in sorted({other for k in kept for other in module_of(k, self.base)}):
            whole[name] = self._replacement(self.base.tensors[name], moved=name in kept)
            if self.outcomes[name].done == UNTOUCHED:
                self.outcomes[name] = replace(self.outcomes[name], reason=SAVED_WITH)
        for name in sorted(kept):
            if self.base.ties_embeddings and is_vocabulary(self.base.tensors[name], self.base):
                whole.setdefault(self._tied_head(), whole[name])
        return whole

    def _replacement(self, info: TensorInfo, *, moved: bool) -> Whole:
        if not info.is_float:
            return Whole(info.shape, info.dtype, partial(self.base.read, info.name))
        dtype = torch.promote_types(self.dtype, info.dtype)
        return Whole(info.shape, dtype, partial(self._weight, info, dtype, moved=moved))

    def _weight(self, info: TensorInfo, dtype: torch.dtype, *, moved: bool) -> Tensor:
        start, update = self._read(info) if moved else (self.base.read(info.name), None)
        weight = (start + update.dense() if update else start).to(dtype)
        if not is_finite(weight):
            raise _too_narrow(info.name, dtype)
        return weight

    def _tied_head(self) -> str:
        """PEFT ties modules that it keeps whole only where it is given both."""
        stored = (n for n, info in self.base.tensors.items() if is_tied_head(info, self.base))
        return next(stored, HEAD)

    def _report(self, folder: Path, lineage: Lineage, base_model: str) -> ExtractReport:
        tensors = tuple(self.outcomes.values())
        warnings = [*losses(tensors), *lacking(tensors, LACKING), *self._oddities()]
        for warning in warnings:
            logger.warning(warning)
        size = (folder / ADAPTER).stat().st_size
        return ExtractReport(base_model, lineage.params, tensors, tuple(warnings), size)

    def _oddities(self) -> Iterator[str]:
        """Sentences on what the adapter cannot say."""
        name = self.expert.name
        if self.expert.extra:
            yield (
                f"Expert {name!r} has {self.expert.extra[0]} and {len(self.expert.extra)} tensors "
                "in all that the base lacks; the adapter is without them."
            )
        tables = [table for table in self.factors if is_table(table)]
        if tables and self.base.ties_embeddings:
            yield (
                f"{tables[0]} is also the output head, which PEFT moves along only when the "
                "adapter is merged into the base (`merge_and_unload`); choose vocabulary keep to "
                "use the adapter unmerged."
            )
        with Checkpoint(self.expert.folder) as tuned:
            own_head = not tuned.ties_embeddings and any(is_head(name) for name in tuned.tensors)
            if self.base.ties_embeddings and tuned.config and own_head:
                yield (
                    f"Expert {name!r} has an output head of its own, which the base ties to the "
                    "embedding; the adapter is without it, and only the full checkpoint has it."
                )


def _base_model(source: Source, base: Checkpoint) -> str:
    """What PEFT and model hubs call the base: its repository where it came from a hub."""
    if source.uri.startswith("hf://"):
        return source.uri.removeprefix("hf://").split("@")[0]
    return str(base.config.get("_name_or_path") or base.folder.resolve().name)


def _too_narrow(name: str, dtype: torch.dtype) -> NumericalError:
    return NumericalError(f"{name} does not fit into {dtype}; choose another `dtype`.")
