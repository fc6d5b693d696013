"""What the last complete run stands for: written when a run ends, read before the next begins.

A version carries the key of its run; the registered model says which version was the last. That may
be an older one, where the sources went back to what they were.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poemerge.errors import SourceError
from tasks.dvc_store import is_held
from tasks.tracking import connected, tracking_uri
from tasks.versions import KEY, SOURCES, find, numbered, tag, tag_model

INPUTS = "poemerge.inputs"  # JSON: what the key is made from
LAST = "poemerge.last"  # tag of the registered model: number of a version


@dataclass(frozen=True)
class Last:
    """The version that the last complete run stands for.

    Attributes:
        name: of the registered model.
        number: of the version.
        aliases: that mean it now.
        key: one hash for `inputs`.
        inputs: all that decided the outcome.
        uri: where its bytes are.
    """

    name: str
    number: str
    aliases: tuple[str, ...]
    key: str
    inputs: Mapping[str, Any]
    uri: str

    @property
    def title(self) -> str:
        """Name, number and aliases."""
        aliases = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.name} version {self.number}{aliases}"

    def exists(self) -> bool:
        """True if its bytes can be had, as far as a quick look tells.

        Raises:
            SourceError: MLflow refused.
        """
        if is_held(self.uri):
            from tasks.dvc_store import reference  # noqa: PLC0415 - DVC: 0.2 s

            return reference.exists(reference.Reference.parse(self.uri)[0])
        with connected():
            import mlflow  # noqa: PLC0415 - 1 s, and only once it is calm

            return bool(mlflow.artifacts.list_artifacts(self.uri, tracking_uri=tracking_uri()))


def keep(folder: Path, key: str, inputs: Mapping[str, Any]) -> None:
    """Say that a complete run with these inputs stands for what is registered.

    Args:
        folder: of registration.json.
        key: one hash for `inputs`.
        inputs: all that decided the outcome; `sources` are name → revision.

    Raises:
        SourceError: MLflow refused, or does not have what was registered.
    """
    entry = json.loads((folder / "registration.json").read_text(encoding="utf-8"))
    tags = {SOURCES: json.dumps(inputs["sources"]), INPUTS: json.dumps(inputs), KEY: key}
    with connected() as client:
        version = find(client, entry["name"], entry["digest"])
        if version is None:
            message = f"MLflow has no version of {entry['name']} with the bytes that {folder} names"
            raise SourceError(f"{message}; run again.")
        tag(client, version, tags)
        tag_model(client, version.name, {LAST: str(version.version)})


def last(name: str) -> Last | None:
    """The version of `name` that the last complete run stands for; None if there is none.

    Raises:
        SourceError: MLflow refused.
    """
    with connected() as client:
        models = client.search_registered_models(f"name = '{name}'")
        number = models[0].tags.get(LAST) if models else None
        version = numbered(client, name, number) if number else None
        if version is None or not {KEY, INPUTS} <= version.tags.keys():
            return None
        number = str(version.version)
        aliases = tuple(a for a, n in sorted(models[0].aliases.items()) if str(n) == number)
        inputs = json.loads(version.tags[INPUTS])
        return Last(name, number, aliases, version.tags[KEY], inputs, version.source)
