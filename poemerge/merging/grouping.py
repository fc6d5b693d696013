"""Each tensor's rule and voters, and tensors for which they are the same, together."""

from dataclasses import dataclass, replace

import torch

from poemerge.checkpoint import Checkpoint
from poemerge.curvature import Curvature
from poemerge.experts import Expert
from poemerge.merging.cuts import cut_for
from poemerge.merging.groups import Group
from poemerge.method import Method
from poemerge.rules import AVERAGE, COPY, MATRIX, TIED, rule_for
from poemerge.settings import Settings
from poemerge.tensor_files import TensorInfo


@dataclass(frozen=True)
class Grouping:
    """What decides on the tensors, one by one."""

    base: Checkpoint
    experts: tuple[Expert, ...]
    method: Method
    settings: Settings
    curvature: Curvature

    def groups(self) -> tuple[Group, ...]:
        """Tensors of equal file, dtype, shape, rule and voters, together."""
        found: dict[tuple[str, torch.dtype, Group], list[TensorInfo]] = {}
        for info in self.base.tensors.values():
            key = (info.file, info.dtype, self._decide(info))
            found.setdefault(key, []).append(info)
        return tuple(
            replace(group, tensors=tuple(tensors)) for (_, _, group), tensors in found.items()
        )

    def _decide(self, info: TensorInfo) -> Group:
        """A group with no tensors yet."""
        voters = tuple(i for i, expert in enumerate(self.experts) if expert.votes(info))
        ranks = tuple(self.experts[i].rank(info) for i in voters)
        rule = rule_for(
            info,
            self.base,
            structured=self.method.structured(self.settings),
            sided=hasattr(self.settings, "side"),
            touched=any(rank != 0 for rank in ranks),
        )
        if rule in {COPY, TIED}:
            return Group(rule, info.shape, (), (), ())
        if len(info.shape) != 2 or not self.method.factors(self.settings):
            ranks = tuple(None for _ in ranks)
        entries = 0
        if self.curvature.needed and rule != AVERAGE:
            entries = self.curvature.entries(info, voters)
            rule = rule if entries else AVERAGE
        cut = cut_for(info, self.base, self.settings) if rule == MATRIX else None
        return Group(rule, info.shape, voters, ranks, (), cut, entries)
