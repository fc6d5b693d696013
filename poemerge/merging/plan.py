"""The plan of a merge: which rule, which voters, which batch; made from headers and a glance.

`poemerge check` prints it, `merge.py` executes it.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from poemerge.checkpoint import Checkpoint
from poemerge.curvature import Curvature
from poemerge.errors import SettingError
from poemerge.experts import Expert, open_expert
from poemerge.fitting import check_tie
from poemerge.merging import notes
from poemerge.merging.cuts import check_cuts
from poemerge.merging.findings import findings
from poemerge.merging.glance import look
from poemerge.merging.grouping import Grouping
from poemerge.merging.groups import Group
from poemerge.merging.growth import Growth, plan_growth
from poemerge.merging.memory import LIMITS, batch_bytes, fit, peak_bytes, streamed
from poemerge.merging.terms import STRICT, Terms
from poemerge.method import Method
from poemerge.methods import find
from poemerge.poe.settings import HeavySettings
from poemerge.remote.stand_ins import at_hand
from poemerge.settings import Settings
from poemerge.tensor_files import TensorInfo

CPU = torch.device("cpu")


@dataclass
class Plan:
    """A merge that could be done; holds the inputs open until closed."""

    base: Checkpoint
    experts: tuple[Expert, ...]
    method: Method
    settings: Settings
    curvature: Curvature
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    growth: Growth | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def rules(self) -> Mapping[str, str]:
        """Tensor name → rule, in the order of names."""
        return dict(sorted((t.name, g.rule) for g in self.groups for t in g.tensors))

    @property
    def read_bytes(self) -> int:
        """What is read: the base and every expert, once."""
        sizes = (
            path.stat().st_size for e in self.experts for path in e.folder.glob("*.safetensors")
        )
        return sum(t.bytes for t in self.base.tensors.values()) + sum(sizes)

    def fitted(self, device: torch.device, budget: int | None = None) -> Self:
        """The same where experts come one by one that do not fit together.

        Args:
            device: where to solve.
            budget: of memory, in bytes, or None for what is usual.
        """
        groups = streamed(self.groups, self.method, self.settings, device, budget)
        return replace(self, groups=groups)

    def limit(
        self, device: torch.device, budget: int | None = None, *, sampled: bool = False
    ) -> int:
        """Loaded bytes of a batch, within a budget of memory (bytes) if there is one.

        Args:
            device: where to solve.
            budget: bytes, or None.
            sampled: True if posteriors are sampled too.

        Raises:
            SettingError: the budget is too small for the largest tensor group.
        """
        usual = LIMITS[device.type]
        if budget is not None:
            usual = fit(self.groups, self.method, self.settings, device, budget, sampled=sampled)
        return batch_bytes(self.method, device, usual)

    def peak_bytes(self, device: torch.device = CPU, budget: int | None = None) -> int:
        """Estimate of the largest resident memory, whole process."""
        plan = self.fitted(device, budget)
        return peak_bytes(plan.groups, self.method, self.settings, plan.limit(device, budget))

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Shape of a tensor of the merge, which may have more token rows than the base."""
        return info.shape if self.growth is None else self.growth.shape(info)

    def close(self) -> None:
        """Let go of all files."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    base: Path | str,
    experts: Mapping[str, Path | str],
    method: str,
    settings: Mapping[str, Any],
    terms: Terms = STRICT,
) -> Plan:
    """Open everything, check that it fits, and decide each tensor's rule.

    Args:
        base: checkpoint folder, or the URL of one elsewhere.
        experts: name → checkpoint or adapter folder, or URL, in the order that counts.
        method: name of a method.
        settings: its settings; unnamed ones take their defaults.
        terms: on which experts are taken that do not fit.

    Raises:
        PoemergeError: something cannot be merged; the message says what.
    """
    found = find(method)
    parsed = found.settings.parse(settings)
    _check_names(tuple(experts), parsed)
    check_cuts(parsed)
    with ExitStack() as stack:
        start, *folders = stack.enter_context(at_hand([base, *experts.values()]))
        checkpoint = stack.enter_context(Checkpoint(start))
        opened = []
        for name, folder in zip(experts, folders, strict=True):
            opened.append(open_expert(name, folder, checkpoint, terms.vocabulary))
            stack.callback(opened[-1].close)
            check_tie(name, folder, opened[-1].untied, checkpoint)
        curvature = Curvature(tuple(experts), parsed)
        stack.callback(curvature.close)
        groups = Grouping(checkpoint, tuple(opened), found, parsed, curvature).groups()
        said = [*notes.on_experts(checkpoint, opened, groups), *notes.on_base(checkpoint)]
        said += [*notes.on_settings(parsed, groups), *notes.on_curvature(curvature, groups)]
        robust = isinstance(parsed, HeavySettings)
        seen = look(checkpoint, opened, terms) if terms.values else []
        said += findings(checkpoint, seen, terms, method, robust=robust)
        return Plan(
            checkpoint,
            tuple(opened),
            found,
            parsed,
            curvature,
            groups,
            tuple(said),
            plan_growth(checkpoint, opened),
            stack.pop_all(),
        )


def _check_names(experts: tuple[str, ...], settings: Settings) -> None:
    if not experts:
        raise SettingError("No expert is given; a merge needs at least one.")
    for name in settings.weights:
        if name not in experts:
            raise SettingError(f"weights names no expert by {name!r}; use {', '.join(experts)}.")
    if not any(settings.weights.get(name, 1.0) != 0 for name in experts):
        raise SettingError("weights gives every expert 0; leave at least one a say.")
