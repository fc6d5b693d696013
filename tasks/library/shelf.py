"""Where experts stand: put on it, looked through, taken off."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poemerge.errors import SettingError, SourceError
from tasks import versions
from tasks.dvc_store.reference import Reference, put
from tasks.library.expert import Expert
from tasks.tracking import connected, has_registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ROOM = "experts"  # before the name, in the references of DVC; for people


def add(expert: Expert, folder: Path) -> tuple[Expert, bool]:
    """Put an expert into the library.

    Args:
        expert: what is known of it; `tags` are added to those that its model has.
        folder: its files, inside the DVC repository; whoever made it may delete it afterwards.

    Returns:
        The expert with its number; True if it is new, False if its bytes were a version already.

    Raises:
        SourceError: the name is that of a merge, or these bytes are there as another expert.
        SettingError: there is no DVC repository.
    """
    with connected() as client:
        versions.claim(client, expert.name, versions.EXPERT)
        known = versions.find(client, expert.name, expert.digest)
        if known is None:
            source = Reference(f"{ROOM}/{expert.name}", put(folder).oid).uri
            version = versions.create(
                client, expert.name, source, expert.facts, description=_words(expert)
            )
        else:
            version = known
            _update(client, known, expert)
        versions.tag_model(client, expert.name, expert.tags)
        return replace(expert, number=str(version.version)), known is None


def experts() -> tuple[Expert, ...]:
    """The newest version of every expert, by name."""
    if not has_registry():
        return ()
    with connected() as client:
        found = [(model, versions.newest(client, model.name)) for model in _models(client)]
        return tuple(Expert.of(version, model.tags) for model, version in found if version)


def find(source: str) -> Expert | None:
    """The expert that a `models:/` source means now; None for a version of anything else.

    Raises:
        SourceError: there is no such version.
    """
    with connected() as client:
        version = versions.resolve(client, source)
        return Expert.of(version, {}) if versions.BASE_DIGEST in version.tags else None


def select(wanted: Mapping[str, str]) -> tuple[Expert, ...]:
    """The newest version of every expert that has all these tags, by name.

    Raises:
        SettingError: there is none.
    """
    known = experts()
    found = tuple(expert for expert in known if expert.matches(wanted))
    if not found:
        text = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise SettingError(
            f"None of the {len(known)} experts in the library has {text}; `poemerge experts list` "
            "shows their tags."
        )
    return found


def remove(name: str, number: str | None, *, force: bool) -> list[str]:
    """Take an expert, or one version of it, out of MLflow; its bytes stay in DVC until `dvc gc`.

    Args:
        name: of the registered model.
        number: of the version; None for all of them.
        force: even if registered merges were made from it.

    Returns:
        What was removed, as `models:/NAME/VERSION`.

    Raises:
        SourceError: there is no such expert, or a merge was made from it.
    """
    with connected() as client:
        if name not in {model.name for model in _models(client)}:
            raise SourceError(f"The library has no expert {name}; see `poemerge experts list`.")
        every = versions.every(client, name)
        leaving = [v for v in every if number in {None, str(v.version)}]
        if number is not None and not leaving:
            numbers = ", ".join(str(v.version) for v in every)
            raise SourceError(f"Expert {name} has no version {number}; it has {numbers}.")
        if not force:
            for version in leaving:
                _check_unused(client, version)
        for version in leaving:
            client.delete_model_version(name, str(version.version))
        if leaving == every:
            client.delete_registered_model(name)
        return [versions.uri(version) for version in leaving]


def _models(client: Any) -> list[Any]:
    """Registered models that are experts, by name."""
    query = f"tag.`{versions.KIND}` = '{versions.EXPERT}'"
    return versions.paged(client.search_registered_models, query, order_by=["name"])


def _update(client: Any, known: "ModelVersion", expert: Expert) -> None:
    """The bytes are there: what is said of them must agree; a score may be new."""
    then = Expert.of(known, {})
    if (then.task, then.base_digest) != (expert.task, expert.base_digest):
        raise SourceError(
            f"{then.uri} has the same bytes, as an expert for {then.task} on {then.base}; give "
            f"--name to add them for {expert.task} on {expert.base} too."
        )
    if expert.score is not None:
        versions.tag(client, known, {versions.SCORE: expert.facts[versions.SCORE]})


def _check_unused(client: Any, version: "ModelVersion") -> None:
    merges = versions.made_from(client, version)
    if merges:
        raise SourceError(
            f"{versions.uri(merges[0])} was made from {versions.uri(version)}, and its lineage "
            "could not be followed any more; say --force to remove it all the same."
        )


def _words(expert: Expert) -> str:
    score = "" if expert.score is None else f" Test: {expert.score:.1%}."
    return f"Expert for {expert.task}, fine-tuned from {expert.base}.{score}"
