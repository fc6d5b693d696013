"""An expert as the library holds it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from poemerge.errors import SettingError
from tasks import versions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FACTS = ("name", "task")  # that may be asked for like tags, and so are none
RESERVED = ("poemerge.", "mlflow.")
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Expert:
    """A version of an expert.

    Attributes:
        name: of the registered model.
        task: what it was trained for.
        digest: sha256 over its files.
        base: what it was fine-tuned from, as the user wrote it.
        base_digest: sha256 over the base's weight files.
        score: on its own task, test split; None where it was not scored.
        tags: the user's, which all versions share.
        number: of the version; empty before there is one.
    """

    name: str
    task: str
    digest: str
    base: str
    base_digest: str
    score: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    number: str = ""

    @property
    def uri(self) -> str:
        """The source that always means this version."""
        return f"{versions.SCHEME}{self.name}/{self.number}"

    @property
    def facts(self) -> dict[str, str]:
        """What MLflow keeps with the version."""
        known = {
            versions.TASK: self.task,
            versions.DIGEST: self.digest,
            versions.BASE: self.base,
            versions.BASE_DIGEST: self.base_digest,
        }
        return known if self.score is None else known | {versions.SCORE: repr(self.score)}

    @classmethod
    def of(cls, version: "ModelVersion", tags: Mapping[str, str]) -> Self:
        """Read a version, and the tags of its model."""
        facts, score = version.tags, version.tags.get(versions.SCORE)
        return cls(
            version.name,
            facts[versions.TASK],
            facts[versions.DIGEST],
            facts[versions.BASE],
            facts[versions.BASE_DIGEST],
            None if score is None else float(score),
            {key: tags[key] for key in sorted(tags) if not key.startswith(RESERVED)},
            str(version.version),
        )

    def matches(self, wanted: Mapping[str, str]) -> bool:
        """True if it has every one of these tags; `name` and `task` count as such."""
        known = {**self.tags, "name": self.name, "task": self.task}
        return all(known.get(key) == value for key, value in wanted.items())

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self) | {"uri": self.uri}


def check_tags(tags: Mapping[str, str]) -> None:
    """Refuse keys that MLflow, poemerge or a selection would take for something else.

    Raises:
        SettingError: naming the key.
    """
    for key in tags:
        if key in FACTS or key.startswith(RESERVED) or not KEY.fullmatch(key):
            raise SettingError(
                f"{key!r} can be no tag; take letters, digits, _ . and -, and none of "
                f"{', '.join((*FACTS, *RESERVED))}."
            )
