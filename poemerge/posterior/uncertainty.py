"""How sure a merge is of each of its matrices."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from poemerge.device import pick_device
from poemerge.merge import name_experts
from poemerge.merging.choices import Choices, Draws
from poemerge.merging.plan import plan_merge
from poemerge.merging.terms import LENIENT
from poemerge.merging.walk import Walk
from poemerge.progress import Progress, silent
from poemerge.rules import COPY

UNIT = (
    "relative_std is √E‖M - M*‖² / ‖M*‖ in Laplace's approximation at temperature 1, where the "
    "noise is what the experts' residuals leave: 0 is certain, 1 is as uncertain as the merged "
    "update is large."
)


def describe_uncertainty(
    base: Path | str,
    experts: Mapping[str, Path | str] | Sequence[Path | str],
    method: str,
    settings: Mapping[str, Any],
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where a merge is uncertain, matrix by matrix; nothing is written.

    Args:
        base: checkpoint folder.
        experts: checkpoint or adapter folders, by name or in order.
        method: a product of experts.
        settings: of the method.
        device: `auto`, `cpu` or `cuda[:i]`.
        progress: called with (tensors done, tensors in all).

    Returns:
        `tensors`: name → {`relative_std`} of what was solved, in the order of names, and `unit`: a
        sentence on what that is.

    Raises:
        PoemergeError: the merge is refused, or the method has no posterior.
    """
    choices = Choices(pick_device(device), "source", "full", seed=0, draws=Draws(1))
    found: dict[str, dict[str, float]] = {}
    with plan_merge(base, name_experts(experts), method, settings, LENIENT) as plan:
        walk, tell = Walk(plan, choices), progress or silent
        with torch.inference_mode(), closing(walk.batches()) as batches:
            for batch, loaded in batches:
                if batch.group.rule == COPY:
                    continue
                posterior = walk.applier.merge(batch, loaded).posterior
                facts = posterior.facts if posterior else ()
                found |= {i.name: dict(f) for i, f in zip(batch.tensors, facts, strict=False)}
                tell(len(found), len(plan.base.tensors))
    return {"tensors": dict(sorted(found.items())), "unit": UNIT}
