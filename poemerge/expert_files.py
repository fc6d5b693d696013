"""Experts on disk, full checkpoints and LoRA adapters alike, seen as updates of the base."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from poemerge.adapter import Adapter, is_adapter
from poemerge.checkpoint import Checkpoint, Rows, TensorFiles, TensorInfo
from poemerge.errors import CheckpointError
from poemerge.fitting import (
    align,
    check_fit,
    check_shape,
    has_place,
    heads_from_embedding,
    require_common,
    shapes_of,
    token_matrices,
    untied_target,
    untied_tensor,
)
from poemerge.rules import is_head
from poemerge.token_rows import REFUSE, TokenRows, gather, match_rows
from poemerge.update import Dense, LowRank, Update


class Expert(Protocol):
    """One expert; names are the base's."""

    name: str
    folder: Path
    extra: tuple[str, ...]  # tensors that cannot be merged, since the base lacks or ties them
    untied: str  # a tensor that it changes at one end of what the base ties; empty if there is none
    tokens: TokenRows  # how its rows of embedding and head lie to the base's
    notes: tuple[str, ...]  # sentences on what was bridged

    def votes(self, info: TensorInfo) -> bool:
        """False if the expert lacks this tensor, so that the others decide alone."""

    def rank(self, info: TensorInfo) -> int | None:
        """Rank of its update in factors, 0 where it leaves the tensor alone, None if dense."""

    def stored(self, info: TensorInfo) -> torch.dtype:
        """Dtype of the weight, or of its factors, on disk; the base's where there is neither."""

    def update(self, info: TensorInfo, base: Tensor) -> Update:
        """A = W - W₀ in fp32 or better, given W₀ in fp32; finite, or CheckpointError."""

    def fill(self, info: TensorInfo, base: Tensor, out: Tensor, rows: Rows | None) -> None:
        """Write the dense update of those rows into `out`, given W₀ there; it may not be finite."""

    def factors(self, info: TensorInfo) -> LowRank:
        """The update in factors, fp32, on the CPU, where `rank` is a number; maybe not finite."""

    def weight(self, info: TensorInfo, rows: Rows | None) -> Tensor | None:
        """Its own rows of a tensor as they are stored; None where it has an update in factors."""

    def close(self) -> None:
        """Let go of the files."""


class FullExpert:
    """A full fine-tuned checkpoint; a prefix that only one side has in its names is bridged."""

    def __init__(self, name: str, folder: Path, base: Checkpoint, vocabulary: str) -> None:
        self.name, self.folder = name, folder
        self._checkpoint = Checkpoint(folder)
        self._names = align(name, folder, base, shapes_of(self._checkpoint))
        require_common(name, folder, base, self._names)
        self.untied = untied_tensor(self._checkpoint, self._names, base)
        tied = heads_from_embedding(self._names, self._checkpoint, base)
        self._names |= tied
        self.tokens = self._match(base, vocabulary)
        known = set(self._names.values())
        self.extra = tuple(
            name
            for name in self._checkpoint.tensors
            if name not in known and not (base.ties_embeddings and is_head(name))
        )
        if not self.tokens.kept:
            tables = token_matrices(self._names, base)
            self._names = {own: n for own, n in self._names.items() if own not in tables}
        stands = f"Expert {name!r} ties {{}} to its embedding, which stands for it here."
        notes = (self.tokens.note, *(stands.format(head) for head in tied))
        self.notes = tuple(note for note in notes if note)

    def _match(self, base: Checkpoint, vocabulary: str) -> TokenRows:
        """Check what it has of the base, and find the base's tokens among its own."""
        tables = token_matrices(self._names, base)
        for own, other in self._names.items():
            check_fit(
                self.name,
                self._checkpoint.tensors[other],
                base.tensors[own],
                any_rows=own in tables,
            )
        rows = {own: self._checkpoint.tensors[self._names[own]].shape[0] for own in tables}
        return match_rows(self.name, self.folder, rows, base, vocabulary)

    def votes(self, info: TensorInfo) -> bool:
        """True if the checkpoint holds the tensor."""
        return info.name in self._names

    def rank(self, info: TensorInfo) -> int | None:  # noqa: ARG002
        """None: a full fine-tune is dense everywhere."""
        return None

    def stored(self, info: TensorInfo) -> torch.dtype:
        """As the checkpoint's header says."""
        return self._checkpoint.tensors[self._names[info.name]].dtype

    def update(self, info: TensorInfo, base: Tensor) -> Update:
        """W - W₀."""
        delta = torch.empty_like(base)
        self.fill(info, base, delta, None)
        check_finite(delta, info.name, f"expert {self.name!r} ({self.folder})")
        return Dense(delta)

    def fill(self, info: TensorInfo, base: Tensor, out: Tensor, rows: Rows | None) -> None:
        """W - W₀."""
        order = self.tokens.order.get(info.name)
        _subtract(self._checkpoint, (self._names[info.name], order), base, out, rows)

    def weight(self, info: TensorInfo, rows: Rows | None) -> Tensor | None:
        """As the checkpoint stores it."""
        return self._checkpoint.read(self._names[info.name], rows)

    def factors(self, info: TensorInfo) -> LowRank:
        """There are none."""
        raise AssertionError(f"{info.name} of a full fine-tune has no factors")

    def close(self) -> None:
        """Let go of the files."""
        self._checkpoint.close()


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
            _subtract(self.adapter, (self.adapter.replaced[info.name], order), base, out, rows)
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


def open_expert(name: str, folder: Path, base: Checkpoint, vocabulary: str = REFUSE) -> Expert:
    """Open `folder` as an adapter or a full checkpoint that was fine-tuned from `base`.

    Args:
        name: of the expert.
        folder: of the expert.
        base: checkpoint.
        vocabulary: what becomes of token rows that do not fit: `refuse`, `pad` or `base`.

    Raises:
        SourceError: there is nothing to open.
        CheckpointError: it does not fit the base.
    """
    kind = AdapterExpert if is_adapter(folder) else FullExpert
    return kind(name, folder, base, vocabulary)


def _subtract(
    files: TensorFiles,
    placed: tuple[str, Tensor | None],  # the tensor's name, and its row for each of the base's
    base: Tensor,
    out: Tensor,
    rows: Rows | None,
) -> None:
    """Write W - W₀ of those rows into `out`; zero where W has no row for one of the base's."""
    key, order = placed
    if order is None:
        pinned = out.device.type == "cuda"
        out.copy_(files.read(key, rows, pinned=pinned), non_blocking=pinned).sub_(base)
        return
    wanted = order if rows is None else order[slice(*rows)]
    known = (wanted >= 0).nonzero().flatten()
    found, at = gather(files, key, wanted[known]).to(out), known.to(out.device)
    out.zero_()
    out[at] = found - base[at]


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: naming the tensor and whose it is.
    """
    if not is_finite(tensor):
        raise CheckpointError(
            f"{name} of {where} holds NaN or infinite values; train or export it again."
        )
