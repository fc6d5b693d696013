"""What a registered version carries, and how one is found: for all who read or move versions."""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poemerge.errors import SourceError
from tasks.tracking import shown_uri, tracking_uri, upsert

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

DIGEST = "poemerge.digest"  # sha256 over the folder's files; one digest has one version
LOADER = "poemerge.loader"  # sha256 over the files that MLflow needs beside those, to load it
KEY = "poemerge.key"  # sha256 of the resolved sources, the parameters and the code
SOURCES = "poemerge.sources"  # JSON: name → what it resolved to
CANDIDATE = "poemerge.candidate"  # label of the merge
METHOD = "poemerge.method"
BASE = "poemerge.base"  # what was merged into, as the user wrote it
BASE_DIGEST = "poemerge.base_digest"  # sha256 over the weight files of the base
TASK = "poemerge.task"  # of an expert: what it was trained for
SCORE = "poemerge.score"  # of an expert, on its own task
KIND = "poemerge.kind"  # of the registered model: MERGE or EXPERT
MERGE, EXPERT = "merge", "expert"
OVERRIDES = "poemerge.overrides"  # `a.b=c` settings that params.yaml does not have
EVALUATION = "poemerge.evaluation"  # the MLflow run that has its outcomes, below ...
EVALUATION_FOLDER = "evaluation"  # ... this artifact path
DECISION = "poemerge.decision"  # number and hash of the decision that made it champion
GAIN = "poemerge.gain"  # over the champion before it, in words
PROMOTED = "poemerge.promoted"  # when, in UTC, and by whom

ABOUT = {  # what MLflow's page of a registered model says first
    MERGE: "Merges by poemerge. `champion` is live, `challenger` is what the last run chose. "
    "`poemerge lineage models:/NAME@champion` says where a version comes from, `poemerge audit` "
    "who made it champion and why.",
    EXPERT: "An expert of the library; `poemerge experts list` shows all.",
}

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"  # aliases

BESIDE = ("MLmodel", "requirements.txt", "python_env.yaml", "components/")

SCHEME = "models:/"
REF = re.compile(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<number>\d+))")


def is_own(name: str) -> bool:
    """True for a file of the model itself, as opposed to those that MLflow needs beside them."""
    return not name.startswith(BESIDE)


def is_ref(text: str) -> bool:
    """True if `text` means a registered version, as opposed to a folder."""
    return text.startswith(SCHEME)


def uri(version: "ModelVersion") -> str:
    """The reference that always means this version."""
    return f"{SCHEME}{version.name}/{version.version}"


def resolve(client: Any, ref: str) -> "ModelVersion":
    """The version that a reference means now.

    Args:
        client: of MLflow.
        ref: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        SourceError: it is no reference, or there is no such model, alias or version.
    """
    parts = REF.fullmatch(ref)
    if parts is None:
        message = f"{ref} is no reference; write models:/NAME@ALIAS or models:/NAME/VERSION."
        raise SourceError(message)
    name, alias, number = parts["name"], parts["alias"], parts["number"]
    found = aliased(client, name, alias) if alias else numbered(client, name, number)
    if found is None:
        known = [each.version for each in every(client, name)]
        there = f"it has versions {', '.join(map(str, known))}" if known else "it has no version"
        aliases = ", ".join(aliases_of(client, name))
        there += f" and aliases {aliases}" if aliases else ""
        raise SourceError(f"MLflow at {shown_uri()} has no {ref}: {there}.")
    return found


def every(client: Any, name: str) -> "list[ModelVersion]":
    """All versions of a model, oldest first; none where there is no such model."""
    return _search(client, f"name = '{name}'")


def find(client: Any, name: str, digest: str) -> "ModelVersion | None":
    """The version that holds exactly these bytes."""
    return next(iter(_with_digest(client, name, digest)), None)


def newest(client: Any, name: str) -> "ModelVersion | None":
    """The version that was registered last."""
    return next(reversed(every(client, name)), None)


def numbered(client: Any, name: str, number: int | str) -> "ModelVersion | None":
    """The version of that number."""
    return next((v for v in every(client, name) if str(v.version) == str(number)), None)


def aliased(client: Any, name: str, alias: str) -> "ModelVersion | None":
    """The version that an alias means now."""
    number = aliases_of(client, name).get(alias)
    return None if number is None else client.get_model_version(name, number)


def aliases_of(client: Any, name: str) -> dict[str, str]:
    """Alias → number, as text; empty where there is no such model."""
    models = client.search_registered_models(f"name = '{name}'")
    return {alias: str(number) for model in models for alias, number in model.aliases.items()}


def tags_of(client: Any, name: str) -> dict[str, str]:
    """Tags of a registered model; empty where there is no such model."""
    models = client.search_registered_models(f"name = '{name}'")
    return {key: value for model in models for key, value in model.tags.items()}


def claim(client: Any, name: str, kind: str) -> None:
    """Make the registered model `name`, for versions of one kind alone.

    Raises:
        SourceError: it holds versions of another kind.
    """
    query = f"name = '{name}'"
    if not client.search_registered_models(query):
        make_model(client, name, tags={KIND: kind}, description=ABOUT[kind])
    for model in client.search_registered_models(query):
        found = model.tags.get(KIND, MERGE)  # there were merges before there were kinds
        if found != kind:
            message = f"{name} is the name of a registered {found}; choose another for this {kind}."
            raise SourceError(message)


def make_model(client: Any, name: str, **how: Any) -> None:
    """Make a registered model, unless another process did so at this very moment."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - 1 s, and only once it is calm

    try:
        client.create_registered_model(name, **how)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def create(client: Any, name: str, source: str, tags: Mapping[str, str], **how: Any) -> Any:
    """Make a version, or take the one that another process has made for the same bytes meanwhile.

    The first counts. It is the same for all who look, and each looks after making his own, so that
    what comes after the first is of no use to anybody.

    Args:
        client: of MLflow.
        name: of the registered model.
        source: where the bytes are.
        tags: of the version, its digest among them.
        **how: what else MLflow takes.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - 1 s, and only once it is calm

    # SQL stores have a version ready when they answer.
    client.create_model_version(name, source, tags=dict(tags), await_creation_for=0, **how)
    first, *others = _with_digest(client, name, tags[DIGEST])
    for version in others:
        with suppress(MlflowException):  # it is gone already, or not ours to delete
            client.delete_model_version(name, str(version.version))
    return first


def made_from(client: Any, version: "ModelVersion") -> "list[ModelVersion]":
    """The versions among whose sources this one is."""
    mark = f"{uri(version)}@"
    found = _search(client, f"tag.`{SOURCES}` LIKE '%{mark}%'")  # _ is a wildcard there
    return [
        v for v in found if any(s.startswith(mark) for s in json.loads(v.tags[SOURCES]).values())
    ]


def with_digest(client: Any, digest: str) -> "list[ModelVersion]":
    """The versions of all models that hold exactly these bytes, by name and number."""
    return sorted(_search(client, f"tag.`{DIGEST}` = '{digest}'"), key=lambda found: found.name)


def tag(client: Any, version: "ModelVersion", tags: Mapping[str, str]) -> None:
    """Set tags of a version; what is so already is not written, and so nobody is notified of it."""
    for key, value in tags.items():
        if version.tags.get(key) != value:
            upsert(client.set_model_version_tag, version.name, str(version.version), key, value)


def tag_model(client: Any, name: str, tags: Mapping[str, str]) -> None:
    """Set tags of a registered model."""
    for key, value in tags.items():
        upsert(client.set_registered_model_tag, name, key, value)


def point(client: Any, name: str, alias: str, number: int | str) -> None:
    """Make an alias mean this version."""
    upsert(client.set_registered_model_alias, name, alias, str(number))


def download(place: str, folder: Path) -> dict[str, Path]:
    """Copy what MLflow has at a place into `folder`.

    Args:
        place: of the bytes themselves; to what `models:/` finds, MLflow adds a file of its own.
        folder: exists, and is empty.

    Returns:
        Relative path → file.

    Raises:
        SourceError: MLflow has not all of it.
    """
    from mlflow import MlflowException  # noqa: PLC0415 - 1 s, and only once it is calm
    from mlflow.artifacts import download_artifacts  # noqa: PLC0415

    try:
        root = Path(
            download_artifacts(place, dst_path=os.fspath(folder), tracking_uri=tracking_uri())
        )
    except (MlflowException, OSError) as error:
        message = f"MLflow has not all of {place} ({' '.join(str(error).split())})."
        raise SourceError(message) from error
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path for path in found}


def paged(search: Callable[..., Any], query: str, **options: Any) -> list[Any]:
    """All that one of MLflow's searches finds, page after page."""
    found, token = [], None
    while True:
        page = search(query, page_token=token, **options)
        found += page
        token = page.token
        if not token:
            return found


def _with_digest(client: Any, name: str, digest: str) -> "list[ModelVersion]":
    return _search(client, f"name = '{name}' and tag.`{DIGEST}` = '{digest}'")


def _search(client: Any, query: str) -> "list[ModelVersion]":
    found = paged(client.search_model_versions, query)
    return sorted(found, key=lambda version: int(version.version))
