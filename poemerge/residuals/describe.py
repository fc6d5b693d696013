"""The public entry: what the experts' residuals at a merge are distributed like."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError, SettingError
from poemerge.experts import Expert, open_expert
from poemerge.experts.values import check_finite
from poemerge.hashing import sha256
from poemerge.lineage import Lineage
from poemerge.merging.apply import seed_of
from poemerge.progress import Progress, silent
from poemerge.residuals.sampling import draw_entries, rounding_of
from poemerge.residuals.summary import Sample, describe_matrix, describe_pool
from poemerge.rules import is_tied_head, is_vocabulary
from poemerge.tensor_files import TensorInfo
from poemerge.token_rows import BASE

SAMPLE = 1 << 15  # entries of a matrix
SIDES = ("output", "input")


def describe_residuals(
    base: Path,
    experts: Mapping[str, Path],
    merged: Path,
    *,
    strength: float = 1.0,
    side: str = "output",
    sample: int = SAMPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit densities to the entries of the directional residuals at a merge.

    Residuals are A_iᵀ (M - A_i) on the output side, (M - A_i) A_iᵀ on the input side, of every
    matrix and every expert that changes it (Bui et al., arXiv 2607.01689).

    An expert's entries are in units of the root mean square of A_iᵀ A_i, which is its residual at
    M = 0: its energy depends on ||R_i||² / γ_i², and γ_i² is a multiple of ||A_iᵀ A_i||². A unit
    taken from R_i itself would hide that one expert is further off than the rest, and that is what
    heavy tails are for. Matrices are pooled in units of their median magnitude.

    Args:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder.
        merged: checkpoint or adapter folder that was merged from them.
        strength: by which the merge scaled its mode: M is the merged update over `strength`. 1
            takes the merged update as it stands.
        side: `output` or `input`, best that of the merge. Vocabulary matrices are taken on the
            input side, on which they are merged.
        sample: entries drawn of a matrix, over all experts.
        seed: of that drawing.
        progress: called with (matrices done, matrices in all).

    Returns:
        Plain data: `side`, `entries`, `zeros`, `histogram`, `fits`, `nu`, `tail_index`, `best`,
        `verdict`, and `tensors`, which has the same for each matrix (docs/residuals.md).

    Raises:
        PoemergeError: an input does not fit, or `merged` was made from another base.
    """
    base, merged = Path(base), Path(merged)
    _check_choices(experts, strength, side, sample)
    _check_base(base, merged)
    with ExitStack() as stack, torch.inference_mode():
        checkpoint = stack.enter_context(Checkpoint(base))
        folders = {**experts, "merged": merged}
        opened = [open_expert(n, Path(f), checkpoint, BASE) for n, f in folders.items()]
        for expert in opened:
            stack.callback(expert.close)
        walk = _Walk(checkpoint, tuple(opened[:-1]), opened[-1], strength, side, sample, seed)
        return walk.run(progress or silent)


@dataclass(frozen=True)
class _Walk:
    """One description under way: what is read, and how it is sampled."""

    base: Checkpoint
    experts: tuple[Expert, ...]
    merged: Expert
    strength: float
    side: str
    sample: int
    seed: int

    def run(self, progress: Progress) -> dict[str, Any]:
        """Sample matrix by matrix, then describe them all."""
        samples, tensors = [], {}
        matrices = {info.name: self.voters(info) for info in self.base.tensors.values()}
        matrices = {name: voters for name, voters in matrices.items() if voters}
        for done, (name, voters) in enumerate(matrices.items(), start=1):
            info = self.base.tensors[name]
            if found := self.sample_of(info, voters):
                samples.append(found)
                tensors[name] = {"side": self.side_of(info), **describe_matrix(found)}
            progress(done, len(matrices))
        zeros = sum(sample.zeros for sample in samples)
        pooled = describe_pool(samples, tuple(tensors.values()))
        return {"side": self.side, "zeros": zeros, **pooled, "tensors": tensors}

    def voters(self, info: TensorInfo) -> tuple[Expert, ...]:
        """Experts that may change a matrix; none for what is no matrix, or has no merge."""
        if len(info.shape) != 2 or not info.is_float or is_tied_head(info, self.base):
            return ()
        if not self.merged.votes(info):
            return ()
        return tuple(e for e in self.experts if e.votes(info) and e.rank(info) != 0)

    def side_of(self, info: TensorInfo) -> str:
        """Side of the residuals of a matrix."""
        return "input" if is_vocabulary(info, self.base) else self.side

    def sample_of(self, info: TensorInfo, voters: tuple[Expert, ...]) -> Sample | None:
        """Entries of all experts' residuals at one matrix; None where no expert changes it."""
        start = self.base.read(info.name).float()
        check_finite(start, info.name, f"the base ({self.base.folder})")
        update = self.merged.update(info, start)
        rounding = rounding_of(update, start, self.merged.stored(info)) / abs(self.strength)
        merged = update.scaled(1 / self.strength)
        turned = self.side_of(info) == "input"
        drawn = []
        for expert in voters:
            draw = torch.Generator().manual_seed(seed_of(self.seed, info.name, expert.name))
            own = expert.update(info, start)
            pair = (own.mT, merged.mT) if turned else (own, merged)
            drawn.append(draw_entries(*pair, -(-self.sample // len(voters)), rounding, draw))
        known = [entries for entries in drawn if entries is not None]
        return Sample.of(*zip(*known, strict=True)) if known else None


def _check_choices(experts: Mapping[str, Path], strength: float, side: str, sample: int) -> None:
    if not experts:
        raise SettingError("No expert is given; residuals are those of the experts of a merge.")
    if side not in SIDES:
        raise SettingError(f"side is {side!r}; choose {' or '.join(SIDES)}.")
    if strength == 0:
        raise SettingError("strength is 0, at which a merge is the base; give that of the merge.")
    if sample < 1:
        raise SettingError(f"sample is {sample}; choose 1 or more, best {SAMPLE}.")


def _check_base(base: Path, merged: Path) -> None:
    """Refuse a merge whose lineage names other weights than the base's."""
    record = Lineage.find(merged)
    sources = [source for source in record.inputs if source.name == "base"] if record else []
    for source in sources:
        for file, recorded in source.files.items():
            path = base / file
            if path.suffix == ".safetensors" and (not path.exists() or sha256(path) != recorded):
                raise CheckpointError(
                    f"{merged} was not merged from {base}: its lineage records another {file}; "
                    "give the base that it was merged from."
                )
