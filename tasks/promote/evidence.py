"""What a registered version brings before the gates: its bytes, its report, its outcomes."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from poemerge.errors import PoemergeError, SourceError
from poemerge.hashing import digest, sha256
from poemerge.layout import RECORD
from poemerge.lineage import Lineage
from tasks.dvc_store import is_held
from tasks.paired import ITEMS, Outcomes
from tasks.versions import (
    DIGEST,
    EVALUATION,
    EVALUATION_FOLDER,
    LOADER,
    download,
    is_own,
    uri,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REPORT = "merge_report.json"
SPLIT = "test"
# What evaluations may differ in and still have asked the same: whom, and on what machine.
WHO = frozenset({"candidate", "kind", "splits", "batch_size", "device"})
TASK = "task:"  # marks the files of a task among an evaluation's inputs


@dataclass(frozen=True)
class Evaluation:
    """How a version did on every item, and how it was asked.

    Attributes:
        outcomes: on the test split.
        params: of the evaluation.
        data: task → hash of its files.
    """

    outcomes: Outcomes
    params: Mapping[str, Any]
    data: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the folder of an evaluation.

        Raises:
            SourceError: a file is missing or broken.
        """
        record = Lineage.find(folder)
        try:
            tasks = list(json.loads((folder / ITEMS).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise SourceError(f"{folder / ITEMS} is unreadable ({error}).") from error
        if record is None:
            raise SourceError(f"{folder} has no {RECORD}.")
        asked = {s.name: s.digest for s in record.inputs if s.name.startswith(TASK)}
        return cls(Outcomes.read(folder, tasks, SPLIT), record.params, asked)

    @property
    def asked(self) -> set[str]:
        """Names of the parameters that decide what was asked."""
        return set(self.params) - WHO

    def differs(self, other: Self) -> str:
        """In what the two were asked differently, in words; empty if they can be compared."""
        said = []
        for key in sorted(self.asked | other.asked):
            ours, theirs = self.params.get(key), other.params.get(key)
            if ours != theirs:
                said.append(f"{key} {json.dumps(ours)} against {json.dumps(theirs)}")
        tasks = {**self.outcomes.ids, **other.outcomes.ids}
        changed = [
            task
            for task in tasks
            if self.outcomes.ids.get(task) != other.outcomes.ids.get(task)
            or self.data.get(TASK + task) != other.data.get(TASK + task)
        ]
        return ", ".join(said + ([f"items of {', '.join(changed)}"] if changed else []))


@contextmanager
def evaluation(client: Any, version: "ModelVersion") -> Iterator[Path]:
    """The folder of a version's evaluation, as `register` kept it.

    Raises:
        SourceError: it kept none.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - 1 s, and only once it is calm

    run = version.tags.get(EVALUATION) or version.run_id
    with TemporaryDirectory() as folder:
        try:
            client.download_artifacts(run, EVALUATION_FOLDER, folder)
        except (MlflowException, OSError) as error:
            message = f"{uri(version)} has no outcomes item by item; `poemerge run` adds them."
            raise SourceError(message) from error
        yield Path(folder, EVALUATION_FOLDER)


@contextmanager
def files(version: "ModelVersion") -> Iterator[Mapping[str, Path]]:
    """The version's files by relative path, as they are in DVC's cache, or a copy of MLflow's.

    Raises:
        PoemergeError: they cannot be had.
    """
    if is_held(version.source):
        from tasks.dvc_store.reference import Reference, contents  # noqa: PLC0415 - imports DVC

        reference, _ = Reference.parse(version.source)
        yield {name: blob.path for name, blob in contents(reference).items()}
        return
    with TemporaryDirectory() as folder:
        yield download(version.source, Path(folder))


def copy_to(folder: Path, version: "ModelVersion") -> Path:
    """The folder, with the version's files in it."""
    with files(version) as found:
        for name, path in found.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def damage(version: "ModelVersion") -> tuple[str, ...]:
    """What is missing or changed among the version's bytes, read and hashed now; in sentences."""
    try:
        with files(version) as found:
            hashes = {n: sha256(path) for n, path in found.items() if Path(n).name != RECORD}
    except PoemergeError as error:
        return (str(error),)
    beside = {name: value for name, value in hashes.items() if not is_own(name)}
    own = {name: value for name, value in hashes.items() if is_own(name)}
    now = {DIGEST: digest(own), LOADER: digest(beside)}
    then = {tag: version.tags.get(tag, digest({})) for tag in now}
    return tuple(
        f"{uri(version)} was registered with {then[tag][:12]}, and its bytes are {now[tag][:12]}."
        for tag in now
        if now[tag] != then[tag]
    )


def merge_report(version: "ModelVersion") -> Mapping[str, Any]:
    """What the merge said of itself; nothing where it left no report."""
    with files(version) as found:
        if REPORT not in found:
            return {}
        report: Mapping[str, Any] = json.loads(found[REPORT].read_text(encoding="utf-8"))
        return report
