"""`poemerge experts add`: fetched, checked against its base, scored on its own task, shelved."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from flows.sections import LABEL, EvaluateParams
from poemerge.errors import CheckpointError, SettingError
from poemerge.hashing import digest, hash_files
from poemerge.merging.plan import plan_merge
from poemerge.merging.terms import Terms
from tasks import library
from tasks.evaluate import RESULTS, evaluate
from tasks.fetch import Base, fetch, identify, trained_on

ROOT = Path(".poemerge/library")
SPLIT = "test"

logger = logging.getLogger(__name__)


def add(
    source: str,
    base: str,
    folder: Path,
    *,
    name: str,
    task: str,
    tags: Mapping[str, str],
    scoring: EvaluateParams | None,
) -> tuple[library.Expert, bool]:
    """Put an expert into the library, once it is clear that it is one of this base.

    Args:
        source: a checkpoint or an adapter; anything that `fetch` takes.
        base: source of what it was fine-tuned from.
        folder: of that base, ready for the core.
        name: of the registered model.
        task: its own.
        tags: by which it is to be found.
        scoring: how its own task is scored; None leaves that out.

    Returns:
        The expert, and whether it is new.

    Raises:
        PoemergeError: it is of another base, cannot be scored, or the library refused it.
    """
    _check_names(name=name, task=task)
    library.check_tags(tags)
    place = ROOT / "add" / name
    try:
        fetch.fn(name, source, place)
        known = identify(base)
        _check_base(source, place, known, folder)
        score = None if scoring is None else _score(name, task, folder, place, scoring)
        content = digest(hash_files(place))
        expert = library.Expert(name, task, content, *known, score, tags)
        return library.add(expert, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _check_names(**names: str) -> None:
    for what, name in names.items():
        if not re.fullmatch(LABEL, name):
            raise SettingError(
                f"--{what} {name!r} is no name; begin with a letter or digit, and go on with those "
                "or _ . and -."
            )


def _check_base(source: str, place: Path, base: Base, folder: Path) -> None:
    """By its lineage, where that says; else by names and shapes of its tensors."""
    known = trained_on(place)
    if known is not None and known.digest != base.digest:
        raise CheckpointError(
            f"{source} was made from {known.uri or 'another base'}, not from {base.uri}; name its "
            "base with --base."
        )
    try:
        with plan_merge(
            folder, {place.name: place}, "average", {}, Terms(vocabulary="base")
        ) as plan:
            for note in plan.notes:
                logger.warning("%s", note)
    except CheckpointError as error:
        raise CheckpointError(f"{source} is no expert of {base.uri}: {error}") from error


def _score(name: str, task: str, base: Path, weights: Path, scoring: EvaluateParams) -> float:
    """On the test split of its own task, as the pipeline scores experts."""
    out = ROOT / "scores" / name
    how = scoring.scoring
    try:
        evaluate.fn(name, "expert", base, weights, out, tasks=[task], splits=[SPLIT], **how)
    except SettingError as error:
        raise SettingError(f"{error} Or leave its score out with --no-score.") from error
    cells = json.loads((out / RESULTS).read_text(encoding="utf-8"))["scores"]
    return float(cells[task][SPLIT]["score"])
