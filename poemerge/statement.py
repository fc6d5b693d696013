"""A lineage record as others read it: an in-toto Statement v1 with SLSA provenance v1 inside.

The subject is what was made, `resolvedDependencies` what it was made of, one descriptor a source.
Standard fields say all that they can; what they have no place for (the files of a source, its
revision, the record found in it) is kept in annotations, so that nothing is lost either way. Fields
that would hold a clock or a machine (`metadata`, `byproducts`) are left out: DVC hashes the record.

Specifications: in-toto Attestation Framework, Statement and ResourceDescriptor v1; SLSA build
provenance v1.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

TYPE = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "poemerge:lineage/2/"  # build type, before the stage; docs/lineage.md says what it means
BUILDER = "poemerge:local"  # whoever ran it, where they ran it: nobody vouches but a signature
GIT = "git:"  # marks a blob's SHA-1 among the files of a source, where a hub states no more
MARK = ":"  # in whatever is no sha256: that, or the `etag:` of an object in a storage
HUB = "hf://"  # whose revisions are commits


def write_statement(record: Mapping[str, Any]) -> dict[str, Any]:
    """The statement that a record makes.

    Args:
        record: the fields of a `Lineage` as plain data, those of its sources' parents likewise.
    """
    return {
        "_type": TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": sha256}}
            for name, sha256 in record["outputs"].items()
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD + record["stage"],
                "externalParameters": {"params": record["params"], **_known(record, "uri")},
                "internalParameters": {
                    "code": record["code"],
                    "device": record["device"],
                    **_known(record, "revision"),
                },
                "resolvedDependencies": [_descriptor(source) for source in record["inputs"]],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": record["packages"]}},
        },
    }


def read_statement(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The record that a statement makes, as `write_statement` was given it.

    Raises:
        ValueError: it is a statement about something else.
        KeyError: it lacks a field; a TypeError or an AttributeError where one is of another kind.
    """
    kind = statement["_type"], statement["predicateType"]
    definition = statement["predicate"]["buildDefinition"]
    build = definition["buildType"]
    if kind != (TYPE, PREDICATE) or not build.startswith(BUILD):
        raise ValueError(f"{' of '.join(kind)}, build type {build}")
    external, internal = definition["externalParameters"], definition["internalParameters"]
    return {
        "stage": build.removeprefix(BUILD),
        "params": external["params"],
        "inputs": [_source(each) for each in definition["resolvedDependencies"]],
        "uri": external.get("uri", ""),
        "revision": internal.get("revision", ""),
        "device": internal["device"],
        "code": internal["code"],
        "packages": statement["predicate"]["runDetails"]["builder"]["version"],
        "outputs": {each["name"]: each["digest"]["sha256"] for each in statement["subject"]},
    }


def _descriptor(source: Mapping[str, Any]) -> dict[str, Any]:
    parent = source["parent"]
    lineage = {"lineage": write_statement(parent)} if parent else {}
    return {
        "name": source["name"],
        **_known(source, "uri"),
        "digest": _digests(source),
        "annotations": {"files": source["files"], **_known(source, "revision"), **lineage},
    }


def _source(descriptor: Mapping[str, Any]) -> dict[str, Any]:
    notes = descriptor["annotations"]
    return {
        "name": descriptor["name"],
        "files": notes["files"],
        "uri": descriptor.get("uri", ""),
        "revision": notes.get("revision", ""),
        "parent": read_statement(notes["lineage"]) if "lineage" in notes else None,
    }


def _digests(source: Mapping[str, Any]) -> dict[str, str]:
    """What others can check: one file's sha256 or a folder's `dirHash`, and a hub's commit."""
    hashes = dict(sorted(source["files"].items()))
    digests: dict[str, str] = {}
    if len(hashes) == 1:
        digests = {"sha256": next(iter(hashes.values()))}
    else:  # what `sha256sum` prints of the files, hashed
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in hashes.items())
        digests = {"dirHash": hashlib.sha256(lines.encode()).hexdigest()}
    if any(MARK in value for value in hashes.values()):
        digests = {}
    if source["uri"].startswith(HUB) and source["revision"]:
        digests["gitCommit"] = source["revision"]
    return digests


def _known(record: Mapping[str, Any], field: str) -> dict[str, str]:
    """A field that may be empty, left out where it is."""
    return {field: record[field]} if record[field] else {}
