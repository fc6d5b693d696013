"""What differs between two models, fact by fact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poemerge.lineage import Lineage, Source
from tasks.provenance.history import Made
from tasks.tracking import flat

Facts = Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """A fact on which two models differ.

    Attributes:
        section: sources, params, code, packages, device, outputs, scores or data.
        key: of the fact, within its section.
        left: what it is of the first model; empty where it has none.
        right: of the second.
    """

    section: str
    key: str
    left: str
    right: str


def differences(left: Made, right: Made) -> tuple[Difference, ...]:
    """All facts that are not the same, by section, in the order of the first model's facts."""
    ours, theirs = _facts(left), _facts(right)
    return tuple(
        Difference(section, key, ours[section].get(key, ""), theirs[section].get(key, ""))
        for section in ours
        for key in {**ours[section], **theirs[section]}
        if ours[section].get(key, "") != theirs[section].get(key, "")
    )


def _facts(made: Made) -> Mapping[str, Facts]:
    scored = made.evaluation
    scores, data = (scored.scores, scored.data) if scored else ({}, {})
    return facts_of(made.record) | {
        "scores": {
            f"{task} {split}": f"{cell['score']:.4f}"
            for task, by in scores.items()
            for split, cell in by.items()
        },
        "data": {f"{task} {file}": h for task, files in data.items() for file, h in files.items()},
    }


def facts_of(record: Lineage) -> dict[str, Facts]:
    """What a record says, section by section."""
    return {
        "sources": _sources(record.inputs),
        "params": flat(record.params),
        "code": record.code,
        "packages": record.packages,
        "device": {"name": record.device},
        "outputs": record.outputs,
    }


def _sources(sources: Sequence[Source]) -> Facts:
    facts = {"order": ", ".join(source.name for source in sources)}
    for source in sources:
        facts[f"{source.name} uri"] = source.uri
        facts[f"{source.name} revision"] = source.revision
        facts[f"{source.name} files"] = source.digest
    return facts
