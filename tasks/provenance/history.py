"""What made a model, all the way down, and what has become of it since."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from poemerge.documents import read_json
from poemerge.errors import SourceError
from poemerge.hashing import digest
from poemerge.lineage import Lineage, Source
from tasks import audit_table
from tasks.provenance.model import Model, opened
from tasks.provenance.shelves import Shelves
from tasks.tracking import connected, has_registry
from tasks.versions import EVALUATION, EVALUATION_FOLDER, aliases_of, uri, with_digest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

TASK = "task:"  # marks the files of a task among the inputs of an evaluation
TOLD = ("when", "kind", "who", "reason")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How a model was scored, and on what.

    Attributes:
        scores: task → split → score, stderr, items, metric.
        data: task → file → sha256.
        params: settings of the evaluation.
    """

    scores: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the folder that an evaluation left.

        Raises:
            SourceError: it has no results.
        """
        record, path = Lineage.find(folder), folder / "results.json"
        try:
            scores = read_json(path)["scores"]
            for cell in (cell for by in scores.values() for cell in by.values()):
                f"{cell['score']:.4f}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{path} is unreadable ({error}); evaluate again.") from error
        tasks = [s for s in record.inputs if s.name.startswith(TASK)] if record else []
        data = {source.name.removeprefix(TASK): source.files for source in tasks}
        return cls(scores, data, record.params if record else {})


@dataclass(frozen=True)
class Version:
    """What MLflow knows of a version.

    Attributes:
        uri: the reference that always means it.
        aliases: that it has now.
        tags: of poemerge.
        source: where its bytes are.
        metrics: of its run: `test/TASK`, `test/mean` and so on.
        decisions: about it, oldest first: when, kind, who and reason of each.
    """

    uri: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    source: str
    metrics: Mapping[str, float]
    decisions: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Made:
    """Something that was made: its record, its versions, and what made its sources.

    Attributes:
        record: of the making.
        versions: in MLflow, with exactly these bytes; oldest first.
        evaluation: None where nobody knows of one.
        sources: each with what made it, None for a source that nobody has a record of.
    """

    record: Lineage
    versions: tuple[Version, ...]
    evaluation: Evaluation | None
    sources: tuple[tuple[Source, "Made | None"], ...]

    @property
    def digest(self) -> str:
        """One sha256 for all outputs."""
        return digest(dict(self.record.outputs))

    def as_json(self) -> dict[str, Any]:
        """Plain data, sources nested."""
        record, scored = self.record, self.evaluation
        return {
            "stage": record.stage,
            "digest": self.digest,
            "key": record.key,
            "uri": record.uri,
            "revision": record.revision,
            "params": record.params,
            "code": record.code,
            "packages": record.packages,
            "device": record.device,
            "outputs": record.outputs,
            "versions": [vars(version) for version in self.versions],
            "evaluation": None if scored is None else vars(scored),
            "sources": [
                {
                    "name": source.name,
                    "uri": source.uri,
                    "revision": source.revision,
                    "digest": source.digest,
                    "files": source.files,
                    "made": made.as_json() if made else None,
                }
                for source, made in self.sources
            ],
        }


def history(ref: str, roots: Sequence[Path]) -> Made:
    """Follow a reference down to sources that nothing is known of but their hashes.

    Args:
        ref: a folder, `models:/...` or `dvc://...`.
        roots: folders to look for evaluations in, where MLflow has none.

    Raises:
        PoemergeError: the reference means nothing that can be had.
    """
    with opened(ref) as model, _registry() as client:
        return _made(model.record, client, Shelves.below(roots), model)


@contextmanager
def _registry() -> Iterator[Any]:
    """A client of MLflow; None where there is none, or none that answers."""
    with ExitStack() as stack:
        client = None
        if has_registry():
            try:
                client = stack.enter_context(connected())
            except SourceError as error:
                logger.warning("versions are left out: %s", error)
        yield client


def _made(record: Lineage, client: Any, shelves: Shelves, model: Model | None = None) -> Made:
    content = model.registered if model and model.registered else digest(dict(record.outputs))
    found = with_digest(client, content) if client and record.stage == "merge" else ()
    sources = []
    for source in record.inputs:
        parent = Lineage.of(source.parent) if source.parent else None
        sources.append((source, _made(parent, client, shelves) if parent else None))
    versions = tuple(_version(client, each) for each in found)
    return Made(record, versions, _evaluation(client, found, shelves, record), tuple(sources))


def _version(client: Any, version: "ModelVersion") -> Version:
    number = str(version.version)  # int from SQL, str over REST
    names = aliases_of(client, version.name)
    return Version(
        uri(version),
        tuple(sorted(alias for alias, meant in names.items() if meant == number)),
        {key: value for key, value in version.tags.items() if key.startswith("poemerge.")},
        version.source,
        dict(client.get_run(version.run_id).data.metrics) if version.run_id else {},
        tuple(_decisions(client, version.name, int(number))),
    )


def _decisions(client: Any, name: str, number: int) -> Iterator[Mapping[str, str]]:
    """Those in force."""
    for row in audit_table.read(client, name).rows:
        if row.decision.version == number and not row.void:
            yield {key: str(getattr(row.decision, key)) for key in TOLD}


def _evaluation(
    client: Any, versions: "Sequence[ModelVersion]", shelves: Shelves, record: Lineage
) -> Evaluation | None:
    """From the project's folders, or from the run of a version."""
    for folder in shelves.evaluations(record):
        return Evaluation.read(folder)
    for version in versions:
        run = version.tags.get(EVALUATION, version.run_id)
        if run and any(each.path == EVALUATION_FOLDER for each in client.list_artifacts(run)):
            with TemporaryDirectory() as scratch:
                client.download_artifacts(run, EVALUATION_FOLDER, scratch)
                return Evaluation.read(Path(scratch, EVALUATION_FOLDER))
    return None
