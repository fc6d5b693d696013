"""Which base it is: one hash for the weights behind a source, wherever they lie by now."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from poemerge.hashing import digest
from poemerge.lineage import Lineage
from tasks.fetch.sources import open_source

STAGE = "fetch"
WEIGHTS = (".safetensors", ".bin", ".gguf")


class Base(NamedTuple):
    """A base model: `uri` as somebody wrote it, `digest` over its weight files by name."""

    uri: str
    digest: str


def identify(source: str) -> Base:
    """The base that a source is.

    A folder that was fetched counts as what it was fetched from: a .gguf file and its dequantised
    copy are one base, whatever the dtype.

    Args:
        source: as for `fetch`.

    Raises:
        SourceError: as for `fetch`.
    """
    origin = open_source(source, "float32")  # which is no part of the answer
    return Base(source, _digest(origin.files, origin.parent))


def trained_on(folder: Path) -> Base | None:
    """The base that an expert was made from, where its lineage says; through copies of it too."""
    found = Lineage.find(folder)
    record = None if found is None else asdict(found)
    while record and record["stage"] == STAGE:
        record = record["inputs"][0]["parent"] if record["inputs"] else None
    source = next((s for s in record["inputs"] if s["name"] == "base"), None) if record else None
    return source and Base(source["uri"], _digest(source["files"], source["parent"]))


def _digest(files: Mapping[str, str], parent: Mapping[str, Any] | None) -> str:
    weights = {name: value for name, value in files.items() if name.endswith(WEIGHTS)}
    if parent and parent["stage"] == STAGE and weights.items() <= parent["outputs"].items():
        for read in parent["inputs"]:  # there is one
            return _digest(read["files"], read["parent"])
    return digest(weights)
