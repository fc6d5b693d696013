"""What an extraction did to every tensor, as plain data, and what of it deserves a look."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poemerge.atomic import write_json
from poemerge.extracting.rules import BIAS, DROPPED, FACTORS, UNTOUCHED

REPORT = "extract_report.json"
CURES: Mapping[str, str] = {
    "vectors=drop": "choose vectors keep to have them whole",
    "vocabulary=drop": "choose vocabulary factors or keep to have it",
    BIAS: "only the full checkpoint has them",
}


@dataclass(frozen=True)
class TensorOutcome:
    """One tensor.

    Attributes:
        done: `factors`, `kept whole`, `dropped` or `untouched` (the base's value stands).
        norm: ||A|| of what fine-tuning changed.
        rank: of its factors.
        error: ||A - Â|| / ||A|| of what the adapter makes of it: 0 if kept whole, 1 if dropped.
        share: of the sum of squared singular values, 1 - error².
        reason: why it is not in factors.
    """

    name: str
    shape: tuple[int, ...]
    done: str
    norm: float = 0.0
    rank: int = 0
    error: float = 0.0
    reason: str = ""

    @property
    def share(self) -> float:
        """Σ σ² that is kept over Σ σ²."""
        return 1.0 - self.error**2


@dataclass(frozen=True)
class ExtractReport:
    """One extraction: what was asked, what became of each tensor, what deserves a look.

    Attributes:
        params: rank, svd, vectors, vocabulary, dtype and device as asked.
        size: of `adapter_model.safetensors`, bytes.
    """

    base: str
    params: Mapping[str, Any]
    tensors: tuple[TensorOutcome, ...]
    warnings: tuple[str, ...]
    size: int

    @property
    def factors(self) -> tuple[TensorOutcome, ...]:
        """The tensors whose updates are in factors."""
        return tuple(tensor for tensor in self.tensors if tensor.done == FACTORS)

    @property
    def worst(self) -> TensorOutcome:
        """The tensor whose factors miss most of its update."""
        return max(self.factors, key=lambda tensor: tensor.error)

    @property
    def mean_error(self) -> float:
        """Mean relative error of the factors."""
        return sum(tensor.error for tensor in self.factors) / len(self.factors)

    @property
    def error(self) -> float:
        """||A - Â|| / ||A|| over all tensors together, the dropped ones included."""
        return missed(self.tensors) / math.hypot(*(tensor.norm for tensor in self.tensors))

    @property
    def counts(self) -> Mapping[str, int]:
        """How many tensors were treated how."""
        done = [tensor.done for tensor in self.tensors]
        return {key: done.count(key) for key in sorted(set(done))}

    def write(self, folder: Path) -> None:
        """Write `extract_report.json` into `folder`."""
        record = asdict(self) | {
            "error": self.error,
            "mean_error": self.mean_error,
            "worst": self.worst.name,
            "tensors": [asdict(tensor) | {"share": tensor.share} for tensor in self.tensors],
        }
        write_json(folder / REPORT, record)


def missed(tensors: Sequence[TensorOutcome]) -> float:
    """||A - Â|| over some tensors."""
    return math.hypot(*(tensor.norm * tensor.error for tensor in tensors))


def losses(tensors: Sequence[TensorOutcome]) -> list[str]:
    """Sentences on what was dropped, one a reason, with the norm that is lost."""
    whole = math.hypot(*(tensor.norm for tensor in tensors))
    dropped = [tensor for tensor in tensors if tensor.done == DROPPED]
    sentences = []
    for reason in sorted({tensor.reason for tensor in dropped}):
        lost = [tensor for tensor in dropped if tensor.reason == reason]
        size = missed(lost)
        sentences.append(
            f"{_names(lost)} dropped ({reason}), norm {size:.3g} or {size / whole:.1%} of the "
            f"whole update's; {CURES.get(reason, 'only the full checkpoint has it')}."
        )
    return sentences


def lacking(tensors: Sequence[TensorOutcome], reason: str) -> list[str]:
    """A sentence on the tensors that the expert has not got."""
    missing = [t for t in tensors if t.done == UNTOUCHED and t.reason == reason]
    if not missing:
        return []
    return [f"{_names(missing)} not in the expert; the adapter leaves the base's as they are."]


def _names(tensors: Sequence[TensorOutcome]) -> str:
    if len(tensors) == 1:
        return f"{tensors[0].name} is"
    return f"{tensors[0].name} and {len(tensors) - 1} more are"
