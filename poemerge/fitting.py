"""Whether an expert fits its base: names, shapes, kinds of numbers, tied or untied heads."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from poemerge.adapter import Adapter
from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError
from poemerge.rules import is_head, is_tied_head, is_vocabulary, repeats_embedding
from poemerge.tensor_files import TensorFiles, TensorInfo

Shapes = Mapping[str, tuple[int, ...]]  # by the name of the tensor


def shapes_of(files: TensorFiles) -> Shapes:
    """Shapes of all tensors."""
    return {name: info.shape for name, info in files.tensors.items()}


def align(name: str, folder: Path, base: Checkpoint, expert: Shapes) -> dict[str, str]:
    """Base name → expert name, under the prefix that matches most (none if it is as good).

    Two towers of one model have tensors of like names: the shapes tell them apart.

    Raises:
        CheckpointError: two parts of the base fit the expert equally well.
    """
    wanted = shapes_of(base)
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


def has_place(name: str, base: Checkpoint) -> bool:
    """True for a tensor of the base that is merged or copied, and not left to its tie."""
    return name in base.tensors and not is_tied_head(base.tensors[name], base)


def require_common(name: str, folder: Path, base: Checkpoint, names: dict[str, str]) -> None:
    """Refuse an expert of which the base knows no tensor."""
    if not names:
        raise CheckpointError(
            f"Expert {name!r} ({folder}) has no tensor in common with the base {base.folder}; give "
            "an expert that was fine-tuned from this base."
        )


def check_fit(expert: str, own: TensorInfo, base: TensorInfo, *, any_rows: bool = False) -> None:
    """Refuse another shape, and floats on one side with integers on the other.

    Args:
        expert: its name.
        own: the expert's tensor.
        base: the base's.
        any_rows: True for token rows, whose number is looked at elsewhere.
    """
    if own.shape[any_rows:] != base.shape[any_rows:] or len(own.shape) != len(base.shape):
        raise _misfit(expert, own.shape, base)
    if own.is_float != base.is_float:
        raise CheckpointError(
            f"{base.name} is stored as {own.dtype} in expert {expert!r} and {base.dtype} in the "
            "base; give an expert that was fine-tuned from this base, and export it unquantised."
        )


def check_shape(expert: str, shape: tuple[int, ...], base: TensorInfo) -> None:
    """Refuse another shape."""
    if shape != base.shape:
        raise _misfit(expert, shape, base)


def token_matrices(names: Iterable[str], base: Checkpoint) -> list[str]:
    """Those of the base's tensors that have one row a token."""
    return [name for name in names if is_vocabulary(base.tensors[name], base)]


def heads_from_embedding(
    names: Mapping[str, str], expert: Checkpoint, base: Checkpoint
) -> dict[str, str]:
    """The base's own output heads → the embedding of an expert that ties the two.

    Args:
        names: base name → expert name, of what the expert stores.
        expert: the fine-tune.
        base: the base.
    """
    if not expert.ties_embeddings:
        return {}
    tables = [name for name in token_matrices(names, base) if not is_head(name)]
    return {
        name: names[tables[0]]
        for name, info in base.tensors.items()
        if tables and is_head(name) and name not in names and not is_tied_head(info, base)
    }


def untied_tensor(expert: Checkpoint, names: Mapping[str, str], base: Checkpoint) -> str:
    """An output head of the expert's own where the base's is tied to its embedding; or nothing."""
    if not base.ties_embeddings:
        return ""
    placed = {other for own, other in names.items() if has_place(own, base)}
    heads = [i for n, i in expert.tensors.items() if is_head(n) and n not in placed]
    return next((info.name for info in heads if not repeats_embedding(info, expert)), "")


def untied_target(adapter: Adapter, base: Checkpoint) -> str:
    """Likewise of an adapter, for which PEFT gives up the tie once one end of it is its own."""
    if not base.ties_embeddings:
        return ""
    heads = [n for n in adapter.replaced if is_head(n) and not has_place(n, base)]
    tables = list(_replaced_embeddings(adapter, base))
    apart = [n for n in adapter.factors if is_head(n) and not has_place(n, base)]
    apart += [n for n in heads if not any(_equal(adapter, n, table) for table in tables)]
    apart += [table for table in tables if not heads and adapter.lora.saves(table)]
    return next(iter(apart), "")


def check_tie(expert: str, folder: Path, tensor: str, base: Checkpoint) -> None:
    """Refuse a tensor that changes one end of what the base ties.

    Raises:
        CheckpointError: there is such a tensor.
    """
    if tensor:
        raise CheckpointError(
            f"Expert {expert!r} ({folder}) changes {tensor} apart from the other end of the tie, "
            f"but the base ({base.folder}) ties its output head to its embedding; give the full "
            "checkpoint of it, and a base that stores both (`tie_word_embeddings: false`, lm_head "
            "a copy of the embedding)."
        )


def _replaced_embeddings(adapter: Adapter, base: Checkpoint) -> Iterator[str]:
    for name in adapter.replaced:
        if name in base.tensors and is_vocabulary(base.tensors[name], base) and not is_head(name):
            yield name


def _equal(adapter: Adapter, one: str, other: str) -> bool:
    return torch.equal(*(adapter.read(adapter.replaced[name]) for name in (one, other)))


def _misfit(expert: str, shape: tuple[int, ...], base: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{base.name} has shape {shape} in expert {expert!r} and {base.shape} in the base; give "
        "an expert that was fine-tuned from this base."
    )
