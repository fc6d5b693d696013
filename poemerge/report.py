"""Reports: what was decided about every tensor, as plain data."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from poemerge.atomic import write_json
from poemerge.rules import MEANINGS

REPORT = "merge_report.json"
GROWTH_LIMIT = 10.0
CONDITION_LIMIT = 1e10  # solved in fp64, which leaves six digits


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Attributes:
        rule: see rules.py.
        experts: names of those that voted.
        norms: ||A_i|| of each voter, ||M|| last; empty for copied tensors.
        certificate: where a product of experts was solved (certificate.py).
        truncation: ||M - M_r|| / ||M|| where the merged update was cut to a rank.
    """

    name: str
    rule: str
    shape: tuple[int, ...]
    dtype: str
    experts: tuple[str, ...] = ()
    norms: tuple[float, ...] = ()
    certificate: Mapping[str, Any] = field(default_factory=dict)
    truncation: float = 0.0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """From what `asdict` gave, having been JSON."""
        rows = {name: tuple(fields[name]) for name in ("shape", "experts", "norms")}
        return cls(**{**fields, **rows})


@dataclass(frozen=True)
class MergeReport:
    """One merge: what was asked, what was done to each tensor, what deserves a look."""

    method: str
    settings: Mapping[str, Any]
    experts: tuple[str, ...]
    device: str
    dtype: str
    output: str
    tensors: tuple[TensorReport, ...]
    warnings: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write `merge_report.json` into `folder`."""
        write_json(folder / REPORT, asdict(self))

    @property
    def rules(self) -> Mapping[str, int]:
        """How many tensors each rule got."""
        counts = Counter(tensor.rule for tensor in self.tensors)
        return {rule: counts[rule] for rule in MEANINGS if counts[rule]}


def warn(tensors: tuple[TensorReport, ...], settings: Mapping[str, Any]) -> list[str]:
    """Sentences on solves that did not settle, or whose answer is not to be trusted blindly."""

    def beyond(key: str, limit: float) -> list[TensorReport]:
        return [tensor for tensor in tensors if tensor.certificate.get(key, 0.0) > limit]

    findings = (
        _unsettled([t for t in tensors if not t.certificate.get("converged", True)], settings),
        _blown_up(beyond("growth", GROWTH_LIMIT)),
        _ill_conditioned(beyond("condition", CONDITION_LIMIT)),
    )
    return [finding for finding in findings if finding]


def _unsettled(tensors: list[TensorReport], settings: Mapping[str, Any]) -> str:
    if not tensors:
        return ""
    return (
        f"{tensors[0].name}{_others(tensors)} did not settle in {settings.get('max_steps')} steps; "
        "raise `max_steps`, or `ridge` if the experts nearly coincide."
    )


def _blown_up(tensors: list[TensorReport]) -> str:
    if not tensors:
        return ""
    worst = max(tensors, key=lambda tensor: tensor.certificate["growth"])
    return (
        f"{worst.name}{_others(tensors)} grew to {worst.certificate['growth']:.1f} times the "
        "largest expert's norm, which nearly collinear experts cause; compare a larger `ridge` on "
        "validation data."
    )


def _ill_conditioned(tensors: list[TensorReport]) -> str:
    if not tensors:
        return ""
    worst = max(tensors, key=lambda tensor: tensor.certificate["condition"])
    return (
        f"{worst.name}{_others(tensors)} has a system of condition "
        f"{worst.certificate['condition']:.0e}, which magnifies the rounding of the experts' "
        "weights as many times; raise `ridge`."
    )


def _others(tensors: list[TensorReport]) -> str:
    return f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
