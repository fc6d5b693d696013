"""The merge stage: one candidate, from base and experts to a complete model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task

from poemerge.hashing import sha256
from poemerge.lineage import Lineage
from tasks.progress import progress


@task
def merge(
    base: str,
    experts: dict[str, str],
    out: str,
    *,
    method: str,
    settings: dict[str, Any],
    device: str,
    dtype: str,
    seed: int,
    memory: int | None,
    vocabulary: str,
    foreign: str,
    runtime: dict[str, Any],
) -> bool:
    """Merge the experts into the folder `out`, unless it is up to date.

    Args:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder.
        out: folder to make.
        method: name of a merge method.
        settings: of the method.
        device: auto, cpu or cuda[:i]; several of them for a runner with a worker for each.
        dtype: of the merged weights: source, float32, bfloat16 or float16.
        seed: of methods that draw at random.
        memory: budget in bytes, or None.
        vocabulary: of token rows that do not fit: refuse, pad or base.
        foreign: of an expert of another base: refuse or warn.
        runtime: where its shards are made: what `open_runner` takes, by name.

    Returns:
        True if it was merged, False if it was up to date.
    """
    from poemerge.merge import merge_checkpoints  # noqa: PLC0415 - imports torch
    from tasks.runners import open_runner  # noqa: PLC0415 - likewise

    folders = {name: Path(folder) for name, folder in experts.items()}
    choices: dict[str, Any] = {"device": device, "dtype": dtype, "seed": seed, "memory": memory}
    choices["vocabulary"] = vocabulary
    if _record(base, experts, method, settings, **choices).is_current(Path(out)):
        return False
    merge_checkpoints(
        base,
        folders,
        out,
        method,
        overwrite=True,
        foreign=foreign,
        progress=progress(f"merge {Path(out).name}", "tensors"),
        runner=open_runner(**runtime, device=device),
        **choices,
        **settings,
    )
    return True


def merge_key(
    base: str,
    experts: dict[str, str],
    *,
    method: str,
    settings: dict[str, Any],
    foreign: str,  # noqa: ARG001 - it decides whether, and no byte
    runtime: dict[str, Any],  # noqa: ARG001 - it decides where, and no byte
    **choices: Any,
) -> str:
    """What decides the bytes of a merge: the same key, the same bytes.

    Args:
        base: as in `merge`.
        experts: as in `merge`.
        method: as in `merge`.
        settings: as in `merge`.
        foreign: as in `merge`.
        runtime: as in `merge`.
        **choices: device, dtype, seed, memory and vocabulary.
    """
    return _record(base, experts, method, settings, **choices).key


def curvature_hashes(settings: Mapping[str, Any]) -> dict[str, str]:
    """`curvature of NAME` → sha256 of that expert's file, where settings name any."""
    files = {name: Path(file) for name, file in (settings.get("curvature") or {}).items()}
    return {
        f"curvature of {name}": sha256(file) if file.is_file() else ""  # merge will refuse it
        for name, file in files.items()
    }


def _record(
    base: str, experts: dict[str, str], method: str, settings: dict[str, Any], **choices: Any
) -> Lineage:
    from poemerge.merge import merge_lineage  # noqa: PLC0415 - imports torch

    folders = {name: Path(folder) for name, folder in experts.items()}
    whole = {"output": "full", "rank": None}
    return merge_lineage(Path(base), folders, method, settings, whole | choices)
