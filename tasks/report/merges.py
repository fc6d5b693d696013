"""Merge reports, read back as far as a report shows them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tasks.report.layers import natural
from tasks.report.sources import REPORT, read


@dataclass(frozen=True)
class Matrix:
    """One merged matrix.

    Attributes:
        norms: expert → ||A_i||, of those that voted.
        merged: ||M||, as it was added to the base.
        certificate: where a product of experts was solved (docs/certificates.md).
    """

    name: str
    norms: Mapping[str, float]
    merged: float
    certificate: Mapping[str, Any]

    @classmethod
    def of(cls, tensor: Mapping[str, Any]) -> Self:
        """From its entry in a merge report."""
        *norms, merged = tensor["norms"]
        own = dict(zip(tensor["experts"], norms, strict=True))
        return cls(tensor["name"], own, merged, tensor["certificate"])

    @property
    def weights(self) -> Mapping[str, float]:
        """Expert → its share in the solve; empty where none was done."""
        return dict(zip(self.norms, self.certificate.get("weights", ()), strict=False))


@dataclass(frozen=True)
class Merge:
    """One merge report, its matrices in the order of the checkpoint."""

    label: str
    method: str
    settings: Mapping[str, Any]
    experts: tuple[str, ...]
    rules: Mapping[str, int]
    warnings: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    is_rounded: bool  # stored in 16 bits

    @classmethod
    def read(cls, label: str, folder: Path) -> Self:
        """From the folder of a merged model.

        Raises:
            SourceError: it has no report.
        """
        raw = read(folder / REPORT)
        matrices = [t for t in raw["tensors"] if len(t["shape"]) == 2 and t["norms"]]
        return cls(
            label,
            raw["method"],
            raw["settings"],
            tuple(raw["experts"]),
            dict(Counter(tensor["rule"] for tensor in raw["tensors"])),
            tuple(raw["warnings"]),
            tuple(map(Matrix.of, sorted(matrices, key=lambda t: natural(t["name"])))),
            any(tensor["dtype"].endswith("float16") for tensor in matrices),
        )

    @property
    def solved(self) -> tuple[Matrix, ...]:
        """The matrices that a product of experts decided."""
        return tuple(matrix for matrix in self.matrices if matrix.certificate)

    @property
    def is_solved(self) -> bool:
        """True for a product of experts."""
        return bool(self.solved)

    @property
    def is_reweighted(self) -> bool:
        """True for heavy tails: the weights were found in steps."""
        return any(matrix.certificate["steps"] for matrix in self.solved)
