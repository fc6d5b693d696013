"""The public entry: the best low-rank adapter of a full fine-tune, with its lineage."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from poemerge.adapter import is_adapter
from poemerge.atomic import new_folder
from poemerge.checkpoint import Checkpoint
from poemerge.device import STORED, describe_device, pick_device
from poemerge.errors import SettingError
from poemerge.experts import Expert, open_expert
from poemerge.extracting.report import ExtractReport
from poemerge.extracting.rules import Policy
from poemerge.extracting.walk import Extraction
from poemerge.lineage import Lineage, Source, core_code
from poemerge.names import real_path
from poemerge.outfolder import reserved
from poemerge.progress import Progress, silent
from poemerge.truncate import check_choice


def extract_adapter(
    base: Path | str,
    expert: Path | str,
    out: Path | str,
    rank: int,
    *,
    svd: str = "auto",
    vectors: str = "keep",
    vocabulary: str = "factors",
    dtype: str = "float32",
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Make the best PEFT adapter of rank `rank` of a full fine-tune.

    Args:
        base: checkpoint folder (safetensors, single or sharded).
        expert: full checkpoint that was fine-tuned from it.
        out: folder to make; appears only when it is complete.
        rank: R ≥ 1 of every matrix, less where the matrix has less.
        svd: `exact`, `randomised`, or `auto`: exact where that is cheap (truncate.py).
        vectors: what becomes of moved norms, biases and all else that is no matrix: `keep` its
            module whole (`modules_to_save`), or `drop` it.
        vocabulary: what becomes of the embedding and an untied head: `factors`, `keep` or `drop`.
        dtype: of the stored factors: `float32`, `bfloat16` or `float16`. What is kept whole has the
            base's dtype where that is wider, so that it loses nothing.
        device: `auto`, `cpu` or `cuda[:i]`.
        overwrite: replace `out` where it exists.
        progress: called with (tensors done, tensors in all).

    Returns:
        What was done to every tensor, and what it lost.

    Raises:
        PoemergeError: something was refused; `out` is then untouched.
    """
    base, expert, out = Path(base), Path(expert), Path(out)
    policy = Policy(vectors, vocabulary)
    check_choice(rank, svd)
    _check_sources(expert, dtype)
    chosen = pick_device(device)
    params = {
        "rank": rank,
        "svd": svd,
        "vectors": vectors,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "device": device,
    }
    with (
        reserved([out], [base, expert], overwrite=overwrite),
        _opened(base, expert) as (checkpoint, opened),
    ):
        work = Extraction(checkpoint, opened, policy, rank, svd, STORED[dtype], chosen)
        inputs = (Source.of("base", base), Source.of("expert", expert))
        lineage = Lineage(
            "extract", params, inputs, device=describe_device(chosen), code=core_code()
        )
        with new_folder(out) as folder, torch.inference_mode():
            return work.run(folder, lineage, progress or silent)


@contextmanager
def _opened(base: Path, expert: Path) -> Iterator[tuple[Checkpoint, Expert]]:
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(base))
        opened = open_expert(real_path(expert).name, expert, checkpoint)
        stack.callback(opened.close)
        yield checkpoint, opened


def _check_sources(expert: Path, dtype: str) -> None:
    if dtype not in STORED:
        raise SettingError(f"dtype is {dtype!r}; choose {', '.join(STORED)}.")
    if is_adapter(expert):
        raise SettingError(
            f"{expert} is a PEFT adapter already; use it as it is, or give a full checkpoint."
        )
