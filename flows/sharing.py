"""What a run made, brought to where others find it: the DVC remote."""

import json
import logging

from flows import versioning
from flows.places import Places
from tasks.dvc_store import is_held
from tasks.dvc_store.reference import Reference
from tasks.dvc_store.remote import push
from tasks.library import Expert
from tasks.tracking import connected
from tasks.versions import find, resolve

logger = logging.getLogger(__name__)


def share(places: Places) -> None:
    """Push what a run committed, and the version that it registered.

    The version has more than the merge stage's output (MLmodel), and a run with overrides commits
    nothing.

    Raises:
        SettingError: there is no remote.
        SourceError: the remote refused, or MLflow.
    """
    count = versioning.push() if places.is_plain else 0
    source = _registered(places)
    if is_held(source):
        count += push(Reference.parse(source)[0])
    logger.info("pushed %d objects to the DVC remote", count)


def share_expert(expert: Expert) -> None:
    """Push the bytes of an expert, so that other machines can merge it.

    Raises:
        SettingError: there is no remote.
        SourceError: the remote refused, or MLflow.
    """
    with connected() as client:
        source = resolve(client, expert.uri).source
    logger.info("pushed %d objects to the DVC remote", push(Reference.parse(source)[0]))


def _registered(places: Places) -> str:
    """Where MLflow points for the bytes that this run chose; empty where it chose none."""
    if not places.params.evaluate.tasks:
        return ""
    made = json.loads((places.register / "registration.json").read_text(encoding="utf-8"))
    with connected() as client:
        version = find(client, made["name"], made["digest"])
    return version.source if version else ""
