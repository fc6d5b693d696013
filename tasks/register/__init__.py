"""The register stage: build the leaderboard, choose the best merge, hand it to MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from prefect import task

from poemerge.atomic import write_json
from poemerge.errors import SourceError
from poemerge.hashing import digest
from poemerge.lineage import Lineage, Source, produce
from tasks.register.leaderboard import (
    KINDS,
    SPLITS,
    Choice,
    Comparison,
    Kind,
    Scores,
    leaderboard,
    read_costs,
    read_scores,
)
from tasks.tracking import calm_down

FORMAT = "poemerge/registration/2"  # raise it when the files of this stage change their meaning


@task
def register(
    base: str,
    merges: Mapping[str, str],
    evaluations: Mapping[Kind, Mapping[str, str]],
    logs: Mapping[str, str],
    out: str,
    *,
    tasks: Sequence[str],
    name: str,
    experiment: str,
    choose: Choice,
    store: Literal["dvc", "copy"],
    params: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> bool:
    """Choose the best merge on validation and register it as a version of the model `name`.

    MLflow gets a run for all together, a run below it for every candidate with its outcomes on
    every item, and one version for each content: bytes that it has already are only named
    challenger again. What is live does not change (promote).

    Args:
        base: folder of the base, for its name in the description.
        merges: label → folder of the merged model.
        evaluations: kind → label → folder of its results.json; equals stand in this order.
        logs: label → file with the seconds and peak bytes of the merge; goes to MLflow only.
        out: folder for leaderboard.json and registration.json.
        tasks: the columns; the mean is over all of them, an expert is named after its own.
        name: of the registered model.
        experiment: of the runs in MLflow.
        choose: mean | normalised, on validation.
        store: dvc points MLflow to the DVC cache; copy copies the weights into MLflow.
        params: effective parameters of the whole run, for the record in MLflow.
        overrides: `a.b=c` settings that params.yaml does not have, for the record in MLflow.

    Returns:
        True if something was registered, False if all of it was there already.

    Raises:
        SourceError: a result is missing, the chosen folder was changed, or MLflow refused.
        SettingError: store is dvc, and there is no DVC repository.
    """
    folders = _flat(evaluations)
    scores = {key: _scores(key, folder, tasks) for key, folder in folders.items()}
    board = leaderboard(scores, tasks, choose)
    best = board.best.label
    model = _unchanged(Path(merges[best]), folders["merge", best])
    decisive = {"name": name, "experiment": experiment, "choose": choose, "store": store}
    seen = (Source.of(" ".join(key), folder) for key, folder in folders.items())
    facts = {"format": FORMAT, **decisive, "tasks": list(tasks)}
    record = Lineage("register", facts, (*seen, model))
    models = {label: Path(folder) for label, folder in merges.items()}
    compared = Comparison(board, models, read_costs(logs), params, tuple(overrides), folders)

    calm_down()
    from tasks.register import registry  # noqa: PLC0415  MLflow, DVC and matplotlib: 2 s

    def announce(folder: Path | None = None) -> None:
        entry = registry.entry(compared, model, name=name, base=_title(Path(base)), store=store)
        if folder is not None:
            write_json(folder / "leaderboard.json", board.as_json())
            write_json(folder / "registration.json", {"format": FORMAT, **asdict(entry)})
        key = digest([record.key, params, list(overrides)])
        registry.record(experiment, entry, compared, key)

    if produce(Path(out), record, announce):
        return True
    if registry.holds(name, model.digest):
        return False
    announce()  # the output is current, but MLflow's database was deleted or is another one
    return True


def _flat(evaluations: Mapping[Kind, Mapping[str, str]]) -> dict[tuple[Kind, str], Path]:
    return {
        (kind, label): Path(folder)
        for kind in KINDS
        for label, folder in evaluations.get(kind, {}).items()
    }


def _scores(key: tuple[Kind, str], folder: Path, tasks: Sequence[str]) -> Scores:
    """What a candidate was scored on: an expert on its own task, a merge on both splits."""
    kind, label = key
    splits = SPLITS if kind == "merge" else ("test",)
    needed = [label] if kind == "expert" else tasks
    return read_scores(folder, needed, splits, maybe=tasks)


def _unchanged(model: Path, evaluation: Path) -> Source:
    """The chosen folder's content, which must be what was merged and what was evaluated."""
    source = Source.of("model", model)
    if source.parent is None or source.parent["outputs"] != source.files:
        message = f"{model} is not what the merge stage left there; run merge again."
        raise SourceError(message)
    seen = Lineage.find(evaluation)
    if seen is None or not any(
        read.files and read.files.items() <= source.files.items() for read in seen.inputs
    ):
        message = f"{evaluation} was made from other bytes than {model} has; run evaluate again."
        raise SourceError(message)
    return source


def _title(folder: Path) -> str:
    """Where a fetched folder came from, for people."""
    made = Lineage.find(folder)
    return made.uri if made and made.uri else folder.name
