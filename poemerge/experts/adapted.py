"""A LoRA adapter as an expert."""

from pathlib import Path

import torch
from torch import Tensor

from poemerge.adapter import Adapter
from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError
from poemerge.experts.values import check_finite, subtract
from poemerge.fitting import (
    align,
    check_fit,
    check_shape,
    has_place,
    require_common,
    token_matrices,
    untied_target,
)
from poemerge.rules import is_head
from poemerge.tensor_files import Rows, TensorInfo
from poemerge.token_rows import TokenRows, match_rows
from poemerge.update import Dense, LowRank, Update


class AdapterExpert:
    """A LoRA adapter; what it does not target it leaves alone, which is a vote for no change.

    Its names may be those of a part of the base, such as the vision tower that it was trained on.
    """

    def __init__(self, name: str, folder: Path, base: Checkpoint, vocabulary: str) -> None:
        self.name, self.folder = name, folder
        self.adapter = Adapter(folder)
        self.adapter.rename(align(name, folder, base, self.adapter.shapes))
        targets = (*self.adapter.factors, *self.adapter.replaced)
        require_common(name, folder, base, {t: t for t in targets if t in base.tensors})
        self.untied = untied_target(self.adapter, base)
        self.extra = tuple(sorted(t for t in targets if not has_place(t, base) and not is_head(t)))
        self.tokens = self._match(base, vocabulary)
        self.notes = tuple(note for note in (self.tokens.note,) if note)
        self._silent = frozenset[str]()
        if not self.tokens.kept:
            self._silent = frozenset(self.adapter.drop(token_matrices(base.tensors, base)))
        self._check_base_layers(base)

    def _match(self, base: Checkpoint, vocabulary: str) -> TokenRows:
        """Check what it has of the base, and find the base's tokens among its own."""
        shapes = {n: shape for n, shape in self.adapter.shapes.items() if n in base.tensors}
        tables = token_matrices(shapes, base)
        for own, shape in shapes.items():
            if own in self.adapter.replaced:
                replaced = self.adapter.tensors[self.adapter.replaced[own]]
                check_fit(self.name, replaced, base.tensors[own], any_rows=own in tables)
            elif own not in tables:
                check_shape(self.name, shape, base.tensors[own])
        rows = {own: shapes[own][0] for own in tables}
        tokens = match_rows(self.name, self.folder, rows, base, vocabulary)
        for own in tables:
            if own in self.adapter.factors and own in tokens.order:
                raise CheckpointError(
                    f"Expert {self.name!r} ({self.folder}) adapts {own} in factors, whose rows "
                    "are not matched by token; merge it into its base with PEFT and give the full "
                    "checkpoint, or choose vocabulary base."
                )
        return tokens

    def _check_base_layers(self, base: Checkpoint) -> None:
        for name, key in self.adapter.base_layers.items():
            if name not in base.tensors:
                continue
            original = base.read(name)
            if not torch.equal(self.adapter.read(key).to(original.dtype), original):
                raise CheckpointError(
                    f"{key} in {self.folder} differs from the base's {name}; merge the adapter "
                    "into its own base with PEFT and give the full checkpoint."
                )

    def votes(self, info: TensorInfo) -> bool:
        """An untouched tensor is the base's own; a vocabulary that does not fit says nothing."""
        return info.name not in self._silent

    def rank(self, info: TensorInfo) -> int | None:
        """Rank of the factors; None for a tensor that the adapter replaces whole."""
        if info.name in self.adapter.replaced:
            return None
        return self.adapter.shape(info.name)[1] if info.name in self.adapter.factors else 0

    def stored(self, info: TensorInfo) -> torch.dtype:
        """As the adapter's header says."""
        keys = self.adapter.factors.get(info.name, (self.adapter.replaced.get(info.name),))
        return self.adapter.tensors[keys[0]].dtype if keys[0] else info.dtype

    def update(self, info: TensorInfo, base: Tensor) -> Update:
        """Scaled factors, a dense difference for replaced tensors, zero for the rest."""
        where = f"expert {self.name!r} ({self.folder})"
        if info.name in self.adapter.replaced:
            delta = torch.empty_like(base)
            self.fill(info, base, delta, None)
            check_finite(delta, info.name, where)
            return Dense(delta)
        if info.name in self.adapter.factors:
            factors = self.adapter.update(info.name).to(base.device, torch.float32)
            check_finite(factors.up, info.name, where)
            check_finite(factors.down, info.name, where)
            return factors
        if len(info.shape) == 2:
            return LowRank.zero(*info.shape).to(base.device, torch.float32)
        return Dense(torch.zeros_like(base))

    def fill(self, info: TensorInfo, base: Tensor, out: Tensor, rows: Rows | None) -> None:
        """The factors multiplied out, a difference for replaced tensors, zero for the rest."""
        if info.name in self.adapter.replaced:
            order = self.tokens.order.get(info.name)
            subtract(self.adapter, (self.adapter.replaced[info.name], order), base, out, rows)
        elif info.name in self.adapter.factors:
            both = self.factors(info).to(out.device, torch.float32)
            up = both.up if rows is None else both.up[slice(*rows)]
            torch.mm(up, both.down, out=out)
        else:
            out.zero_()

    def factors(self, info: TensorInfo) -> LowRank:
        """Scaled factors; of rank 0 where the adapter leaves the tensor alone."""
        if info.name not in self.adapter.factors:
            return LowRank.zero(*info.shape)
        return self.adapter.update(info.name)

    def weight(self, info: TensorInfo, rows: Rows | None) -> Tensor | None:
        """What the adapter puts in the place of the base's, where it does so."""
        key = self.adapter.replaced.get(info.name)
        return None if key is None else self.adapter.read(key, rows)

    def close(self) -> None:
        """Let go of the files."""
        self.adapter.close()
