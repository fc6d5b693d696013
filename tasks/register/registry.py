"""The MLflow side: a run for every candidate, and a model version for the best one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunInfo
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.time import get_current_time_millis

from poemerge.hashing import digest, hash_files
from poemerge.layout import RECORD
from poemerge.lineage import Lineage, Source
from tasks.dvc_store import reference
from tasks.register.flavor import company
from tasks.register.heatmap import heatmap
from tasks.register.leaderboard import Comparison, Cost, Row
from tasks.register.note import TAG as NOTE
from tasks.register.note import note
from tasks.tracking import (
    PARENT,
    bury,
    connected,
    ending,
    experiment_id,
    flat,
    marked_run,
    upsert,
)
from tasks.versions import (
    BASE,
    CANDIDATE,
    CHALLENGER,
    DIGEST,
    EVALUATION,
    EVALUATION_FOLDER,
    LOADER,
    MERGE,
    METHOD,
    OVERRIDES,
    claim,
    create,
    find,
    point,
    tag,
)

STAGE = "poemerge.stage"  # tag of a run: what it records
LEADERBOARD = "poemerge.leaderboard"  # tag of the parent run: a report finds it by that
REGISTRATION = "poemerge.registration"  # tag of every run: by which a second try finds it
COPY = "model"  # artifact folder of the weights where they are copied into MLflow


@dataclass(frozen=True)
class Entry:
    """The version to be made.

    Attributes:
        name: of the registered model.
        candidate: label of the merge.
        method: that made it.
        base: what was merged into.
        digest: sha256 over the folder's files; one digest has one version.
        loader: sha256 over the files beside them, by which MLflow loads it.
        source: `dvc://` reference, or empty to copy the folder into MLflow.
        scores: split → task, `mean` and `normalised` → score.
    """

    name: str
    candidate: str
    method: str
    base: str
    digest: str
    loader: str
    source: str
    scores: Mapping[str, Mapping[str, float]]

    @property
    def description(self) -> str:
        """Base, method and scores in words."""
        test = dict(self.scores["test"])
        mean, normalised = test.pop("mean"), test.pop("normalised", None)
        each = ", ".join(f"{task} {score:.1%}" for task, score in test.items())
        words = f"Merge `{self.candidate}` (method {self.method}) of experts of {self.base}. "
        words += f"Test: {each}; mean {mean:.1%}."
        if normalised is not None:
            words += f" On average {normalised:.1%} of what each task's own expert scores."
        return words


def entry(compared: Comparison, model: Source, *, name: str, base: str, store: str) -> Entry:
    """Describe the best merge of a comparison, its bytes brought to where MLflow can point."""
    best = compared.board.best
    folder = compared.merges[best.label]
    with company(folder, base) as beside:
        source = reference.put(folder, beside).uri if store == "dvc" else ""
        loader = digest(hash_files(beside))
    method = (model.parent or {})["params"].get("method", best.label)
    return Entry(name, best.label, method, base, model.digest, loader, source, best.summary())


def holds(name: str, digest: str) -> bool:
    """True if MLflow has a version of `name` with exactly these bytes, registered to the end."""
    with connected() as client:
        version = find(client, name, digest)
        return version is not None and EVALUATION in version.tags


def record(experiment: str, entry: Entry, compared: Comparison, key: str) -> None:
    """Log all candidates and register the best, the challenger.

    Args:
        experiment: of the runs.
        entry: the version.
        compared: the candidates.
        key: what broke off is known by it, and gone on with.
    """
    board = compared.board
    tags = {
        STAGE: "register",
        LEADERBOARD: digest(board.as_json()),
        NOTE: note(board),
        **_overrides(compared),
    }
    with connected() as client:
        claim(client, entry.name, MERGE)
        place = experiment_id(client, experiment)
        others = f"tags.`{STAGE}` = 'register' and run_name = '{entry.name}'"
        bury(client, place, f"{others} and tags.`{REGISTRATION}` != '{key}'")
        runs = _Runs(client, place, key)
        parent = runs.find("", entry.name, tags).run_id
        with ending(client, parent):
            client.log_dict(parent, board.as_json(), "leaderboard.json")
            client.log_dict(parent, dict(compared.params), "params.yaml")
            client.log_figure(parent, heatmap(board), "leaderboard.png")
            client.log_batch(parent, metrics=_metrics(board.best, Cost()))
            logged = [_candidate(runs, parent, row, compared) for row in board.rows]
            own = logged[board.rows.index(board.best)]
            version = find(client, entry.name, entry.digest) or _create(
                client, entry, own, compared
            )
        point(client, entry.name, CHALLENGER, version.version)
        tag(client, version, {EVALUATION: own})


@dataclass(frozen=True)
class _Runs:
    """The runs of one registration, which a second try finds again."""

    client: MlflowClient
    place: str
    key: str

    def find(self, which: str, name: str, tags: Mapping[str, str]) -> RunInfo:
        mark = REGISTRATION, f"{self.key} {which}".strip()
        return marked_run(self.client, self.place, name, mark, tags).info


def _candidate(runs: _Runs, parent: str, row: Row, compared: Comparison) -> str:
    folder = compared.merges[row.label] if row.kind == "merge" else None
    made = Lineage.find(folder) if folder else None
    params = flat(made.params) if made else {}
    tags = {
        PARENT: parent,
        "poemerge.kind": row.kind,
        STAGE: made.stage if made else "fetch",
        METHOD: params.get("method", row.kind),
    }
    if made:
        tags[DIGEST] = digest(dict(made.outputs))
    client, run = runs.client, runs.find(f"{row.kind} {row.label}", row.label, tags)
    if run.status == "FINISHED":
        return run.run_id
    with ending(client, run.run_id) as own:
        cost = compared.costs.get(row.label, Cost()) if made else Cost()
        logged = [Param(key, value) for key, value in params.items()]
        upsert(client.log_batch, own, metrics=_metrics(row, cost), params=logged)
        for file in (folder / RECORD, folder / "merge_report.json") if folder else ():
            if file.is_file():
                client.log_artifact(own, os.fspath(file))
        evaluation = compared.evaluations[row.kind, row.label]
        client.log_artifacts(own, os.fspath(evaluation), EVALUATION_FOLDER)
    return run.run_id


def _metrics(row: Row, cost: Cost) -> list[Metric]:
    scores = row.summary().items()
    values = {f"{split}/{key}": value for split, cells in scores for key, value in cells.items()}
    values |= {key: value for key, value in vars(cost).items() if value is not None}
    now = get_current_time_millis()
    return [Metric(key, float(value), now, 0) for key, value in values.items()]


def _create(client: MlflowClient, entry: Entry, run: str, compared: Comparison) -> ModelVersion:
    source = entry.source
    if not source:
        model = compared.merges[entry.candidate]
        with company(model, entry.base) as beside:
            for folder in (model, beside):
                client.log_artifacts(run, os.fspath(folder), COPY)
        source = f"{client.get_run(run).info.artifact_uri}/{COPY}"
    tags = {
        DIGEST: entry.digest,
        LOADER: entry.loader,
        CANDIDATE: entry.candidate,
        METHOD: entry.method,
        BASE: entry.base,
        **_overrides(compared),
    }
    return create(client, entry.name, source, tags, run_id=run, description=entry.description)


def _overrides(compared: Comparison) -> dict[str, str]:
    return {OVERRIDES: " ".join(compared.overrides)} if compared.overrides else {}
