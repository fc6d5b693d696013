"""Experts on disk, full checkpoints and LoRA adapters alike, seen as updates of the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from poemerge.adapter import Adapter, is_adapter
from poemerge.checkpoint import Checkpoint, Rows, TensorFiles, TensorInfo
from poemerge.errors import CheckpointError
from poemerge.rules import is_head, is_tied_head
from poemerge.task_vector import Dense, LowRank, Update


class Expert(Protocol):
    """One expert; names are the base's."""

    name: str
    folder: Path
    extra: tuple[str, ...]  # tensors that cannot be merged, since the base lacks or ties them

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

    def close(self) -> None:
        """Let go of the files."""


class FullExpert:
    """A full fine-tuned checkpoint; a prefix that only one side has in its names is bridged."""

    def __init__(self, name: str, folder: Path, base: Checkpoint) -> None:
        self.name, self.folder = name, folder
        self._checkpoint = Checkpoint(folder)
        self._names = _align(name, folder, base, _shapes(self._checkpoint))
        _require_common(name, folder, base, self._names)
        for own, other in self._names.items():
            _check_shape(name, self._checkpoint.tensors[other].shape, base.tensors[own])
        known = set(self._names.values())
        self.extra = tuple(
            name
            for name in self._checkpoint.tensors
            if name not in known and not (base.ties_embeddings and is_head(name))
        )

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
        weight = self._checkpoint.read(self._names[info.name]).to(base.device).float()
        check_finite(weight, info.name, f"expert {self.name!r} ({self.folder})")
        return Dense(weight - base)

    def fill(self, info: TensorInfo, base: Tensor, out: Tensor, rows: Rows | None) -> None:
        """W - W₀."""
        pinned = out.device.type == "cuda"
        weight = self._checkpoint.read(self._names[info.name], rows, pinned=pinned)
        out.copy_(weight, non_blocking=pinned).sub_(base)

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

    def __init__(self, name: str, folder: Path, base: Checkpoint) -> None:
        self.name, self.folder = name, folder
        self.adapter = Adapter(folder)
        self.adapter.rename(_align(name, folder, base, self.adapter.shapes))
        targets = (*self.adapter.factors, *self.adapter.replaced)
        _require_common(name, folder, base, {t: t for t in targets if t in base.tensors})
        self.extra = tuple(sorted(t for t in targets if not _has_place(t, base)))
        self._check_shapes(base)
        self._check_base_layers(base)

    def _check_shapes(self, base: Checkpoint) -> None:
        for name, key in self.adapter.replaced.items():
            if name in base.tensors:
                _check_shape(self.name, self.adapter.tensors[key].shape, base.tensors[name])
        for name in self.adapter.factors:
            rows, _, columns = self.adapter.shape(name)
            if name in base.tensors:
                _check_shape(self.name, (rows, columns), base.tensors[name])

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

    def votes(self, info: TensorInfo) -> bool:  # noqa: ARG002
        """Always: an untouched tensor is the base's own."""
        return True

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
            weight = self.adapter.read(self.adapter.replaced[info.name]).to(base.device).float()
            check_finite(weight, info.name, where)
            return Dense(weight - base)
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
            out.copy_(self.adapter.read(self.adapter.replaced[info.name], rows)).sub_(base)
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

    def close(self) -> None:
        """Let go of the files."""
        self.adapter.close()


def open_expert(name: str, folder: Path, base: Checkpoint) -> Expert:
    """Open `folder` as an adapter or a full checkpoint that was fine-tuned from `base`.

    Raises:
        SourceError: there is nothing to open.
        CheckpointError: it does not fit the base.
    """
    kind = AdapterExpert if is_adapter(folder) else FullExpert
    return kind(name, folder, base)


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


Shapes = Mapping[str, tuple[int, ...]]  # by the name of the tensor


def _shapes(files: TensorFiles) -> Shapes:
    return {name: info.shape for name, info in files.tensors.items()}


def _align(name: str, folder: Path, base: Checkpoint, expert: Shapes) -> dict[str, str]:
    """Base name → expert name, under the prefix that matches most (none if it is as good).

    Two towers of one model have tensors of like names: the shapes tell them apart.

    Raises:
        CheckpointError: two parts of the base fit the expert equally well.
    """
    wanted = _shapes(base)
    options = [{n: n for n in wanted}]
    options += [{n: n.removeprefix(p) for n in wanted} for p in _prefixes(wanted, expert)]
    options += [{n: p + n for n in wanted} for p in _prefixes(expert, wanted)]
    matches = [{n: e for n, e in names.items() if e in expert} for names in options]

    def fit(names: Mapping[str, str]) -> tuple[int, int]:
        return sum(wanted[n] == expert[e] for n, e in names.items()), len(names)

    best = max(matches, key=fit)
    rival = next((m for m in matches if m != best and fit(m) == fit(best)), None)
    if rival is not None and best != matches[0]:
        raise CheckpointError(
            f"Expert {name!r} ({folder}) fits {min(best)} of the base as well as {min(rival)}; "
            "give the part of the base that it was trained on as a checkpoint of its own."
        )
    return best


def _prefixes(names: Shapes, others: Shapes) -> list[str]:
    """First parts of `names` without which one of them is among the `others`."""
    parts = (name.partition(".") for name in names)
    return sorted({first + dot for first, dot, rest in parts if dot and rest in others})


def _has_place(name: str, base: Checkpoint) -> bool:
    return name in base.tensors and not is_tied_head(base.tensors[name], base)


def _require_common(name: str, folder: Path, base: Checkpoint, names: dict[str, str]) -> None:
    if not names:
        raise CheckpointError(
            f"Expert {name!r} ({folder}) has no tensor in common with the base {base.folder}; give "
            "an expert that was fine-tuned from this base."
        )


def _check_shape(expert: str, shape: tuple[int, ...], base: TensorInfo) -> None:
    if shape != base.shape:
        raise CheckpointError(
            f"{base.name} has shape {shape} in expert {expert!r} and {base.shape} in the "
            "base; bring both to one shape (the same vocabulary, say) before merging."
        )
