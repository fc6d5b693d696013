"""The public entry: merge checkpoints into a folder, with its lineage."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.atomic import new_folder
from poemerge.checkpoint import Checkpoint
from poemerge.device import describe_device, pick_device
from poemerge.errors import SettingError
from poemerge.expert_files import open_expert
from poemerge.lineage import Lineage, Source, core_code
from poemerge.methods import find
from poemerge.plan import plan_merge
from poemerge.report import MergeReport
from poemerge.walk import Walk

Progress = Callable[[int, int], None]


def merge_checkpoints(
    base: Path | str,
    experts: Mapping[str, Path | str] | Sequence[Path | str],
    out: Path | str,
    method: str = "cauchy_poe",
    device: str = "auto",
    *,
    dtype: str = "source",
    output: str = "full",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge experts that were fine-tuned from one base into a model folder.

    Args:
        base: checkpoint folder (safetensors, single or sharded).
        experts: checkpoint or PEFT adapter folders, by name or in order; the order decides nothing
            but the report.
        out: folder to make; appears only when it is complete.
        method: see `poemerge methods`.
        device: `auto`, `cpu` or `cuda[:i]`.
        dtype: to store: `source`, `float32`, `bfloat16` or `float16`; the mathematics is in fp32 or
            better either way.
        output: `full`, or `adapter` for an exact merged PEFT adapter of rank ≤ Σ r.
        seed: of methods that draw at random.
        overwrite: replace `out` where it exists.
        progress: called with (tensors done, tensors in all).
        **settings: of the method.

    Returns:
        What was done to every tensor.

    Raises:
        PoemergeError: something was refused; `out` is then untouched.
    """
    out = Path(out)
    folders = name_experts(experts)
    _check_out(out, [Path(base), *folders.values()], overwrite=overwrite)
    choices = {"device": device, "dtype": dtype, "output": output, "seed": seed}
    with plan_merge(Path(base), folders, method, settings) as plan:
        walk = Walk(plan, pick_device(device), dtype, output, seed, progress or _silent)
        lineage = merge_lineage(Path(base), folders, method, settings, choices)
        with new_folder(out) as folder, torch.inference_mode():
            return walk.run(folder, lineage)


def merge_lineage(
    base: Path,
    experts: Mapping[str, Path],
    method: str,
    settings: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> Lineage:
    """The record of a merge, before it is done: what decides whether it must be done again."""
    parsed = asdict(find(method).settings.parse(settings))
    with ThreadPoolExecutor(max_workers=2) as pool:
        inputs = tuple(pool.map(Source.of, ("base", *experts), (base, *experts.values())))
    device = describe_device(pick_device(str(choices["device"])))
    params = {"method": method, "settings": parsed, **choices}
    return Lineage("merge", params, inputs, device=device, code=core_code())


def expert_weights(base: Path, expert: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Full weights under the base's names, in the base's dtype.

    Args:
        base: checkpoint folder.
        expert: None for the base itself, else a checkpoint or an adapter fine-tuned from it.

    Yields:
        (name, tensor) in the order of names; tied output heads included where they are stored.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(base))
        opened = open_expert(expert.name, expert, checkpoint) if expert else None
        if opened is not None:
            stack.callback(opened.close)
        for name, info in checkpoint.tensors.items():
            weight = checkpoint.read(name)
            if opened is not None and info.is_float and opened.votes(info):
                start = weight.float()
                weight = (start + opened.update(info, start).dense()).to(info.dtype)
            yield name, weight


def name_experts(experts: Mapping[str, Path | str] | Sequence[Path | str]) -> dict[str, Path]:
    """Names for experts given in order: their folders' names, numbered where those repeat."""
    if isinstance(experts, Mapping):
        return {name: Path(folder) for name, folder in experts.items()}
    named: dict[str, Path] = {}
    for folder in map(Path, experts):
        named[unused_name(folder.resolve().name, named)] = folder
    return named


def unused_name(name: str, taken: Container[str]) -> str:
    """`name`, or `name-2`, `name-3` and so on where it is taken."""
    fresh, count = name, 2
    while fresh in taken:
        fresh, count = f"{name}-{count}", count + 1
    return fresh


def _check_out(out: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    resolved = out.resolve()
    for source in (source.resolve() for source in sources):
        if resolved in (source, *source.parents) or source in resolved.parents:
            raise SettingError(
                f"{out} is, holds or lies in the source {source}; choose another folder."
            )
    if out.exists() and not overwrite:
        raise SettingError(f"{out} exists already; choose another folder, or say `--overwrite`.")


def _silent(_done: int, _total: int) -> None:
    """No progress is wanted."""
