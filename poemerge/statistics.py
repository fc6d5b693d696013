"""Statistics of task vectors: how large, of what rank, how alike; one tensor at a time."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoint import Checkpoint
from poemerge.experts import Expert, open_expert
from poemerge.rules import is_tied_head
from poemerge.tensor_files import TensorInfo
from poemerge.token_rows import BASE
from poemerge.update import LowRank, Update

Compared = tuple[Tensor, Tensor]  # of all updates: inner products (E, E), effective ranks (E,)


def describe_task_vectors(base: Path, experts: Mapping[str, Path]) -> dict[str, Any]:
    """Norms, ranks and pairwise cosines of the experts' task vectors.

    Every value that is read is checked to be finite.

    Args:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder.

    Returns:
        `experts`: for each the norm ||τ||, the number of tensors it changes, its largest rank in
        factors (None if dense) and the mean effective rank of its matrices, ||A||⁴ / ||A Aᵀ||²;
        `cosines`: experts × experts; `tensors`: name → norm of each expert's update there.

    Raises:
        PoemergeError: an input does not fit or is not finite.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(base))
        opened = []
        for name, folder in experts.items():
            opened.append(open_expert(name, folder, checkpoint, BASE))
            stack.callback(opened[-1].close)
        infos = [
            info
            for info in checkpoint.tensors.values()
            if info.is_float and not is_tied_head(info, checkpoint)
        ]
        rows = {info.name: _compare(info, checkpoint, opened) for info in infos}
        ranks = [[e.rank(info) for info in infos if e.votes(info)] for e in opened]
    return _summary(tuple(experts), rows, ranks)


def _summary(
    names: Sequence[str], rows: Mapping[str, Compared], ranks: Sequence[Sequence[int | None]]
) -> dict[str, Any]:
    """As `describe_task_vectors` returns it; `ranks` are each expert's in the tensors it has."""
    grams = torch.stack([gram for gram, _ in rows.values()]).sum(dim=0)
    spread = torch.stack([rank for _, rank in rows.values()])
    norms = grams.diagonal().sqrt()
    return {
        "experts": {
            name: {
                "norm": float(norms[i]),
                "tensors": sum(bool(gram[i, i] > 0) for gram, _ in rows.values()),
                "rank": None if None in ranks[i] else max(r or 0 for r in ranks[i]),
                "effective_rank": float(spread[:, i].nanmean()),
            }
            for i, name in enumerate(names)
        },
        "cosines": (grams / (norms[:, None] * norms[None, :]).clamp_min(1e-300)).tolist(),
        "tensors": {
            name: gram.diagonal().sqrt().tolist()
            for name, (gram, _) in rows.items()
            if bool((gram != 0).any())
        },
    }


def _compare(info: TensorInfo, base: Checkpoint, experts: Sequence[Expert]) -> Compared:
    """All updates of one tensor, in fp64."""
    size = len(experts)
    gram = torch.zeros(size, size, dtype=torch.float64)
    voters = [i for i, e in enumerate(experts) if e.votes(info) and e.rank(info) != 0]
    ranks = torch.full((size,), torch.nan, dtype=torch.float64)
    if not voters:
        return gram, ranks
    weight = base.read(info.name).float()
    updates = {i: experts[i].update(info, weight) for i in voters}
    for i, j in combinations_with_replacement(voters, 2):
        gram[i, j] = gram[j, i] = inner_product(updates[i], updates[j])
    for i in voters:
        if len(info.shape) == 2 and gram[i, i] > 0:
            ranks[i] = gram[i, i] ** 2 / fourth_moment(updates[i])
    return gram, ranks


def inner_product(left: Update, right: Update) -> Tensor:
    """<A, B> in fp64, from the factors where both have them."""
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        return left.inner(right)
    return (left.dense() * right.dense()).sum(dtype=torch.float64)


def fourth_moment(update: Update) -> Tensor:
    """||A Aᵀ||²_F, from the smaller gram."""
    if isinstance(update, LowRank):
        up, down = update.up.double(), update.down.double()
        product = (up.mT @ up) @ (down @ down.mT)
        return (product * product.mT).sum()
    delta = update.dense()
    gram = delta @ delta.mT if delta.shape[0] <= delta.shape[1] else delta.mT @ delta
    return gram.square().sum(dtype=torch.float64)
