"""Kinds of bad input around `lineage.json` and signatures."""

import base64
import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import jsonschema

from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tests.reliability.corpus import trees
from tests.reliability.corpus.bench import Kind
from tests.reliability.corpus.sound import strict_json

RECORD = "lineage.json"
WAYS = (
    *("poemerge lineage", "poemerge verify", "poemerge reproduce", "poemerge lineage json"),
    *("poemerge lineage diff", "poemerge report model", "fetch", "merge", "poemerge experts add"),
)
WRITTEN = (
    *("items.json", "results.json", "leaderboard.json", "registration.json", "task_vectors.json"),
    "merge_report.json",
)
TEXT = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
OLD: dict[str, Any] = {  # format 1, a record or a source's parent
    "type": "object",
    "required": ["stage", "params", "inputs"],
    "additionalProperties": False,
    "properties": {
        **dict.fromkeys(("format", "stage", "uri", "revision", "device"), TEXT),
        **dict.fromkeys(("code", "packages", "outputs"), TEXTS),
        "params": {"type": "object"},
        "inputs": {"type": "array", "items": {"$ref": "#/$defs/source"}},
    },
}
SOURCE = {
    "type": "object",
    "required": ["name", "files"],
    "additionalProperties": False,
    "properties": {
        **dict.fromkeys(("name", "uri", "revision"), TEXT),
        "files": TEXTS,
        "parent": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/old"}]},
    },
}
DESCRIPTOR = {
    "type": "object",
    "required": ["name", "annotations"],
    "properties": {
        "name": TEXT,
        "uri": TEXT,
        "annotations": {
            "type": "object",
            "required": ["files"],
            "properties": {
                "files": TEXTS,
                "revision": TEXT,
                "lineage": {"$ref": "#/$defs/new"},
            },
        },
    },
}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*properties], "properties": properties}


NEW = _object(  # format 2, as docs/lineage.md and the two specifications have it
    _type={"const": "https://in-toto.io/Statement/v1"},
    predicateType={"const": "https://slsa.dev/provenance/v1"},
    subject={
        "type": "array",
        "items": _object(name=TEXT, digest=_object(sha256=TEXT)),
    },
    predicate=_object(
        buildDefinition=_object(
            buildType={"type": "string", "pattern": "^poemerge:lineage/2/"},
            externalParameters=_object(params={"type": "object"}),
            internalParameters=_object(code=TEXTS, device=TEXT),
            resolvedDependencies={"type": "array", "items": {"$ref": "#/$defs/descriptor"}},
        ),
        runDetails=_object(builder=_object(version=TEXTS)),
    ),
)
DEFS = {"$defs": {"old": OLD, "source": SOURCE, "descriptor": DESCRIPTOR, "new": NEW}}


def old_format(folder: Path) -> None:
    """Write a folder's record as format 1 had it."""
    record = asdict(Lineage.read(folder / RECORD)) | {"format": "poemerge/lineage/1"}
    (folder / RECORD).write_text(json.dumps(record))


def _spoil(folder: Path, random: Random) -> None:
    path = folder / "model" / RECORD
    path.write_bytes(trees.spoil_json(path.read_text(), random))
    (folder / "expert" / RECORD).write_bytes(path.read_bytes())


def sound(folder: Path, way: str) -> None:
    """A record that was not refused is one by the schema; what holds by it is what is there."""
    record = strict_json(folder / "model" / RECORD)
    form = NEW if "_type" in record else OLD
    jsonschema.validate(record, {**form, **DEFS})
    if way == "poemerge verify":
        outputs = record.get("outputs") or {
            each["name"]: each["digest"]["sha256"] for each in record["subject"]
        }
        assert outputs == hash_files(folder / "model")
    if way == "poemerge reproduce":
        assert (folder / "out/model.safetensors").read_bytes() == (
            folder / "model/model.safetensors"
        ).read_bytes()


def _sign(folder: Path, random: Random) -> None:
    path = folder / "model.sig"
    path.write_bytes(trees.spoil_json(path.read_text(), random))


def signed(folder: Path, way: str) -> None:
    """A signature that still holds says the same in what is signed."""
    now, then = (_said(strict_json(folder / name)) for name in ("model.sig", "sound.sig"))
    assert now == then


def _said(signature: Any) -> list[bytes]:
    """What is signed, and the signature, once decoded."""
    envelope = signature["dsseEnvelope"]
    return [
        base64.b64decode(text) for text in (envelope["payload"], envelope["signatures"][0]["sig"])
    ]


def _written(folder: Path, random: Random) -> None:
    """A file that a run wrote."""
    path = random.choice(_results(folder))
    path.write_bytes(trees.spoil_json(path.read_text(), random))


def _results(folder: Path) -> list[Path]:
    return [path for name in WRITTEN for path in sorted((folder / "run").rglob(name))]


def reported(folder: Path, way: str) -> None:
    """A report is made of files that are, in what they say, the ones that were written."""
    for path in _results(folder):
        assert strict_json(path) == strict_json(folder / "sound" / path.relative_to(folder / "run"))


RUNS = Kind(
    "runs",
    ("poemerge report run",),
    {"run": ("run",), "sound": ("run",)},
    _written,
    reported,
)
LINEAGES = Kind(
    "lineages",
    WAYS,
    {
        "base": ("base",),
        "first": ("first",),
        "expert": ("adapter",),
        "full": ("full",),
        "other": ("model",),
        "model": ("model", "model-format-1"),
        ".dvc": (".dvc",),
        "mlflow.db": ("mlflow.db",),
    },
    _spoil,
    sound,
)
SIGNATURES = Kind(
    "signatures",
    ("poemerge verify signed",),
    {
        "base": ("base",),
        "model": ("model",),
        "model.sig": ("model.sig",),
        "sound.sig": ("model.sig",),
        "key.pub": ("key.pub",),
    },
    _sign,
    signed,
)
