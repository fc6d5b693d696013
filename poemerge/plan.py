"""The plan of a merge: which rule, which voters, which batch; made from headers alone.

`poemerge check` prints it, `merge.py` executes it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from poemerge.checkpoint import Checkpoint, TensorInfo
from poemerge.errors import CheckpointError, SettingError
from poemerge.expert_files import Expert, open_expert
from poemerge.method import Method
from poemerge.methods import find
from poemerge.rules import COPY, MATRIX, TIED, VOCABULARY, rule_for
from poemerge.settings import Settings

BATCH_BYTES = 64 << 20  # of updates held at once; a larger tensor goes alone
WORKING_COPIES = 5  # of a batch of updates that a method holds at its peak; fp64 is two
OVERHEAD = 350 << 20  # Python, torch and the files' headers


@dataclass(frozen=True)
class Group:
    """Tensors of one shape that are read, merged and written together."""

    rule: str
    shape: tuple[int, ...]
    voters: tuple[int, ...]  # indices of experts
    ranks: tuple[int | None, ...]  # per voter; None is dense
    tensors: tuple[TensorInfo, ...]  # all in one file

    @property
    def file(self) -> str:
        """The base's shard that holds these tensors, and the output's that will."""
        return self.tensors[0].file

    @property
    def in_factors(self) -> bool:
        """True if every voter's update is kept in factors, all the way."""
        return bool(self.ranks) and all(rank is not None for rank in self.ranks)

    @property
    def update_bytes(self) -> int:
        """Size of the voters' updates of one tensor, in fp32."""
        if self.in_factors:
            return 4 * sum(self.shape) * sum(rank or 0 for rank in self.ranks)
        return 4 * math.prod(self.shape) * len(self.voters)

    def batches(self) -> Iterator["Group"]:
        """Cut into groups that fit `BATCH_BYTES`."""
        size = max(1, BATCH_BYTES // max(1, self.update_bytes + 4 * math.prod(self.shape)))
        for start in range(0, len(self.tensors), size):
            part = self.tensors[start : start + size]
            yield Group(self.rule, self.shape, self.voters, self.ranks, part)

    def peak_bytes(self, side: str) -> int:
        """Memory while this group is merged: updates, what the method holds, base and result."""
        work = self.update_bytes * WORKING_COPIES
        if self.rule in {MATRIX, VOCABULARY} and not self.in_factors:
            feature = self.rule == VOCABULARY or side == "input"
            work += 8 * (len(self.voters) + 3) * self.shape[feature] ** 2
        return len(self.tensors) * (work + 12 * math.prod(self.shape))


@dataclass
class Plan:
    """A merge that could be done; holds the inputs open until closed."""

    base: Checkpoint
    experts: tuple[Expert, ...]
    method: Method
    settings: Settings
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def rules(self) -> Mapping[str, str]:
        """Tensor name → rule, in the order of names."""
        return dict(sorted((t.name, g.rule) for g in self.groups for t in g.tensors))

    @property
    def peak_bytes(self) -> int:
        """Estimate of the largest resident memory, whole process."""
        side = getattr(self.settings, "side", "")
        parts = (part.peak_bytes(side) for group in self.groups for part in group.batches())
        return OVERHEAD + max(parts, default=0)

    @property
    def read_bytes(self) -> int:
        """What is read: the base and every expert, once."""
        sizes = (
            path.stat().st_size for e in self.experts for path in e.folder.glob("*.safetensors")
        )
        return sum(t.bytes for t in self.base.tensors.values()) + sum(sizes)

    def close(self) -> None:
        """Let go of all files."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    base: Path, experts: Mapping[str, Path], method: str, settings: Mapping[str, Any]
) -> Plan:
    """Open everything, check that it fits, and decide each tensor's rule.

    Args:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder, in the order that counts.
        method: name of a method.
        settings: its settings; unnamed ones take their defaults.

    Raises:
        PoemergeError: something cannot be merged; the message says what.
    """
    found = find(method)
    parsed = found.settings.parse(settings)
    _check_names(tuple(experts), parsed)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(base))
        opened = []
        for name, folder in experts.items():
            opened.append(open_expert(name, folder, checkpoint))
            stack.callback(opened[-1].close)
        groups = _groups(checkpoint, tuple(opened), found)
        notes = _notes(checkpoint, opened, groups)
        return Plan(checkpoint, tuple(opened), found, parsed, groups, notes, stack.pop_all())


def _check_names(experts: tuple[str, ...], settings: Settings) -> None:
    if not experts:
        raise SettingError("No expert is given; a merge needs at least one.")
    for name in settings.weights:
        if name not in experts:
            raise SettingError(f"weights names no expert by {name!r}; use {', '.join(experts)}.")
    if not any(settings.weights.get(name, 1.0) > 0 for name in experts):
        raise SettingError("weights gives every expert 0; leave at least one a say.")


def _groups(base: Checkpoint, experts: tuple[Expert, ...], method: Method) -> tuple[Group, ...]:
    groups: dict[tuple[Any, ...], list[TensorInfo]] = {}
    for info in base.tensors.values():
        groups.setdefault(_group_key(info, base, experts, method), []).append(info)
    return tuple(
        Group(rule, shape, voters, ranks, tuple(tensors))
        for (rule, shape, voters, ranks, *_), tensors in groups.items()
    )


def _group_key(
    info: TensorInfo, base: Checkpoint, experts: tuple[Expert, ...], method: Method
) -> tuple[Any, ...]:
    voters = tuple(i for i, expert in enumerate(experts) if expert.votes(info))
    ranks = tuple(experts[i].rank(info) for i in voters)
    touched = any(rank != 0 for rank in ranks)
    rule = rule_for(info, base, structured=method.structured, touched=touched)
    if rule in {COPY, TIED}:
        voters, ranks = (), ()
    if len(info.shape) != 2 or not method.factors:
        ranks = tuple(None for _ in ranks)
    return rule, info.shape, voters, ranks, info.dtype, info.file


def _notes(base: Checkpoint, experts: list[Expert], groups: tuple[Group, ...]) -> tuple[str, ...]:
    """Sentences on what does not match: nothing is passed over in silence."""
    notes = []
    for index, expert in enumerate(experts):
        merged = [g for g in groups if g.rule not in {COPY, TIED}]
        missing = [t.name for g in merged if index not in g.voters for t in g.tensors]
        if missing:
            notes.append(f"Expert {expert.name!r} lacks {_list(missing)}; the others decide there.")
        if expert.extra:
            notes.append(
                f"Expert {expert.name!r} has {_list(expert.extra)}, which the base lacks or ties; "
                "left out."
            )
    if not any(group.voters for group in groups):
        raise CheckpointError(
            "No expert changes any tensor of the base; there is nothing to merge."
        )
    if not any(base.folder.glob("tokenizer*")):
        notes.append(f"The base ({base.folder.name}) has no tokenizer; the merge has none either.")
    return tuple(notes)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
