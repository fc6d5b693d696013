"""The public entry: merge checkpoints into a folder, with its lineage."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoint import Checkpoint
from poemerge.device import describe_device, pick_device, split_devices
from poemerge.errors import SettingError
from poemerge.experts import open_expert
from poemerge.fitting import check_tie
from poemerge.lineage import Lineage, Source, core_code
from poemerge.merging.choices import Choices, Draws
from poemerge.merging.head import Head, Runner
from poemerge.merging.terms import Terms
from poemerge.merging.work import Recipe
from poemerge.methods import find
from poemerge.model_card import side_files
from poemerge.names import real_path, unused_name
from poemerge.outfolder import reserved, under_way
from poemerge.progress import Progress, silent
from poemerge.remote.places import last_part, locate
from poemerge.report import MergeReport
from poemerge.token_rows import PAD, REFUSE
from poemerge.unchanged import unchanged

logger = logging.getLogger(__name__)

SAMPLES = "-samples"  # a sibling: within a model folder they would be part of its hashes


def merge_checkpoints(
    base: Path | str,
    experts: Mapping[str, Path | str] | Sequence[Path | str],
    out: Path | str,
    method: str = "cauchy_poe",
    device: str = "auto",
    *,
    dtype: str = "source",
    output: str = "full",
    rank: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    vocabulary: str = "refuse",
    foreign: str = "refuse",
    samples: int = 0,
    sampler: str = "laplace",
    temperature: float = 1.0,
    overwrite: bool = False,
    progress: Progress | None = None,
    runner: Runner | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge experts that were fine-tuned from one base into a model folder.

    A merge that was stopped is gone on with by the same call: what it has finished is in
    `OUT.partial`, and is kept if it still holds (merging/journal.py).

    Args:
        base: checkpoint folder (safetensors, single or sharded), or the URL of one elsewhere
            (`s3://bucket/folder`), of which ranges are read.
        experts: checkpoint or PEFT adapter folders or URLs, by name or in order; the order decides
            nothing but the report.
        out: folder to make; appears only when it is complete. Or a URL, where shards appear as
            they are finished, and the index and the lineage record last.
        method: see `poemerge methods`.
        device: `auto`, `cpu` or `cuda[:i]`; several of one kind, `cuda:0,cuda:1` say, for a runner
            that has a worker for each.
        dtype: to store: `source`, `float32`, `bfloat16` or `float16`; the mathematics is in fp32 or
            better either way.
        output: `full`, or `adapter` for an exact merged PEFT adapter of rank ≤ Σ r.
        rank: to which a merged adapter is truncated, at the best; None leaves it exact.
        seed: of methods that draw at random, and of samples.
        memory: budget in bytes for the whole process; None takes what is quick.
        vocabulary: of experts whose embedding has other rows than the base's: `refuse`; `pad`,
            which matches rows by token and takes added tokens over; `base`, which keeps the base's.
        foreign: of an expert in which nothing of the base is left: `refuse` or `warn`.
        samples: of the posterior of a product of experts, each a folder like `out` itself, in
            `OUT-samples/000`, `001`, ... (docs/posterior.md).
        sampler: `laplace`, Gaussian noise around the mode, or `langevin`, exact and slower.
        temperature: factor on the samples' variance; 1 is what the experts' residuals suggest.
        overwrite: replace `out` where it exists.
        progress: called with (tensors done, tensors in all).
        runner: of one job for each shard, wherever it likes (merging/work.py): the bytes are the
            same; None makes them all in this process, one after another.
        **settings: of the method.

    Returns:
        What was done to every tensor.

    Raises:
        PoemergeError: something was refused, or the machine gave out; `out` is then untouched.
    """
    base, sources = locate(base), name_experts(experts)
    outs = _places(locate(out), samples)
    params = {"device": device, "dtype": dtype, "output": output, "seed": seed}
    params |= {"rank": rank, "memory": memory, "vocabulary": vocabulary}
    draws = Draws(samples, sampler, temperature)
    first = pick_device(_devices(device, runner)[0])
    choices = Choices(first, dtype, output, seed, rank, memory, draws)
    terms = Terms(vocabulary, foreign, dtype)
    recipe = Recipe(base, sources, method, settings, terms, choices)
    with (
        reserved(outs, [base, *sources.values()], overwrite=overwrite),
        recipe.plan() as plan,
        ThreadPoolExecutor(1) as pool,
    ):
        base, folders = plan.base.folder, {e.name: e.folder for e in plan.experts}
        side_files(base)  # refused before the work, not after it
        head = Head(recipe, plan, runner, progress or silent)
        # Inputs are hashed while they are merged.
        lineage = pool.submit(merge_lineage, base, folders, method, settings, params)
        with ExitStack() as stack, torch.inference_mode():
            folder, *places = [
                stack.enter_context(under_way(place, resumable=choices.is_resumable))
                for place in outs
            ]
            stack.enter_context(unchanged([base, *folders.values()]))
            drawn = [place / f"{index:03}" for place in places for index in range(samples)]
            for place in drawn:
                place.mkdir()
            return head.run([folder, *drawn], lineage)


def merge_lineage(
    base: Path,
    experts: Mapping[str, Path],
    method: str,
    settings: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> Lineage:
    """The record of a merge, before it is done: what decides whether it must be done again."""
    parsed = asdict(find(method).settings.parse(settings))
    files = parsed.get("curvature") or {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        inputs = list(pool.map(Source.of, ("base", *experts), (base, *experts.values())))
        names = [f"curvature of {name}" for name in files]
        inputs += pool.map(Source.of_file, names, map(Path, files.values()))
    if files:  # where they lie is no part of the record; what they hold is among the inputs
        parsed["curvature"] = {name: Path(file).name for name, file in files.items()}
    first = split_devices(str(choices["device"]))[0]
    choices = {**choices, "device": first}  # however many there are, one makes the same bytes
    device = describe_device(pick_device(first))
    decisive = {k: v for k, v in choices.items() if (k, v) != ("vocabulary", REFUSE)}  # no byte
    params = {"method": method, "settings": parsed, **decisive}
    return Lineage("merge", params, tuple(inputs), device=device, code=core_code())


def _devices(given: str, runner: Runner | None) -> tuple[str, ...]:
    devices = split_devices(given)
    if len(devices) > 1 and runner is None:
        raise SettingError(
            f"device is {given!r}, and one process merges on one device; choose one of them, or "
            "runner processes, which has a worker for each."
        )
    return devices


def expert_weights(base: Path, expert: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Full weights under the base's names, in the base's dtype.

    Args:
        base: checkpoint folder.
        expert: None for the base itself, else a checkpoint or an adapter fine-tuned from it; its
            token rows go to those of the base.

    Yields:
        (name, tensor) in the order of names; tied output heads included where they are stored.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(base))
        opened = open_expert(expert.name, expert, checkpoint, PAD) if expert else None
        if opened is not None:
            stack.callback(opened.close)
            check_tie(opened.name, opened.folder, opened.untied, checkpoint)
        for name, info in checkpoint.tensors.items():
            weight = checkpoint.read(name)
            if opened is not None and info.is_float and opened.votes(info):
                start = weight.float()
                weight = (start + opened.update(info, start).dense()).to(info.dtype)
            yield name, weight


def name_experts(
    experts: Mapping[str, Path | str] | Sequence[Path | str],
) -> dict[str, Path | str]:
    """Names for experts given in order: their folders' names, numbered where those repeat."""
    if isinstance(experts, Mapping):
        return {name: locate(place) for name, place in experts.items()}
    named: dict[str, Path | str] = {}
    for place in map(locate, experts):
        own = last_part(place) if isinstance(place, str) else real_path(place).name
        named[unused_name(own, named)] = place
    return named


def _places(out: Path | str, samples: int) -> list[Path | str]:
    """The folder to make, and the one beside it for samples, if there are to be any.

    Raises:
        SettingError: there are, and the folder is elsewhere.
    """
    if isinstance(out, str):
        if samples:
            message = f"samples are written on this machine, and {out} is not; choose a folder."
            raise SettingError(message)
        return [out]
    beside = out.with_name(out.name + SAMPLES)
    if beside.exists() and not samples:
        logger.warning("%s holds draws of an earlier merge; delete it, or give samples", beside)
    return [out, beside] if samples else [out]
