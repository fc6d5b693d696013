"""The report stage: one page with everything there is to see of a run, and its pictures."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from prefect import task

from poemerge.atomic import write_json, write_text
from poemerge.errors import SettingError
from poemerge.hashing import digest, hash_files, sha256
from poemerge.lineage import Lineage, core_code, package_versions, produce
from tasks.report.diagnostics import Detail, Look, Side
from tasks.report.numbers import FORMAT, Numbers, gather
from tasks.report.sources import Sources, read

STAGE = "report"
PAGE, NUMBERS = "index.html", "report.json"
WRITTEN = frozenset({".py", ".jinja", ".css", ".js"})
TOOLS = ("matplotlib", "scipy", "jinja2")

logger = logging.getLogger(__name__)


@task
def report(
    base: str,
    experts: Mapping[str, str],
    merges: Mapping[str, str],
    evaluations: Mapping[str, Mapping[str, str]],
    out: str,
    *,
    task_vectors: str,
    register: str,
    experiment: str,
    detail: int,
    side: Side,
    seed: int,
    device: str,
) -> bool:
    """Write the page of a run, and log it to the MLflow run of its leaderboard.

    Args:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder.
        merges: label → folder of the merged model.
        evaluations: kind → label → folder of its items.json.
        out: folder for index.html, report.json and the pictures.
        task_vectors: folder of task_vectors.json.
        register: folder of leaderboard.json.
        experiment: of the runs in MLflow.
        detail: how many merges are looked into, best first on validation.
        side: of the residuals: output | input.
        seed: of the bootstrap, and where residuals are sampled.
        device: auto, cpu or cuda[:i].

    Returns:
        True if something was written or logged, False if all of it was there already.

    Raises:
        PoemergeError: a folder is missing, two do not belong together, or MLflow refused.
    """
    sources = Sources(
        _paths(merges),
        Path(base),
        _paths(experts),
        {kind: _paths(folders) for kind, folders in evaluations.items()},
        Path(task_vectors),
        Path(register),
    )
    made = write_report(sources, Path(out), detail=detail, side=side, seed=seed, device=device)
    from tasks.report.logged import log  # noqa: PLC0415  MLflow: 1 s

    return log(Path(out), Path(register), experiment) or made


def write_report(
    sources: Sources, out: Path, *, detail: int, side: Side, seed: int, device: str
) -> bool:
    """Make the folder of a report, unless it is up to date.

    Args:
        sources: folders of a run, or of one merge.
        out: folder to make.
        detail: how many merges are looked into.
        side: of the residuals.
        seed: of everything drawn.
        device: auto, cpu or cuda[:i].

    Returns:
        True if it was made.

    Raises:
        SettingError: `out` holds something else.
        SourceError: a file is missing, or two do not belong together.
    """
    from poemerge.device import describe_device, pick_device  # noqa: PLC0415  torch: 1 s

    found = Lineage.find(out)
    if out.exists() and any(out.iterdir()) and (found is None or found.stage != STAGE):
        raise SettingError(f"{out} holds something else than a report; choose another --out.")
    params = {"format": FORMAT, "detail": detail, "side": side, "seed": seed, "device": device}
    record = Lineage(
        STAGE,
        params,
        sources.hashed(),
        device=describe_device(pick_device(device)),
        code={**core_code(), "report": _code()},
        packages=dict(package_versions()) | {tool: metadata.version(tool) for tool in TOOLS},
    )

    def work(folder: Path) -> None:
        numbers = gather(sources, seed=seed)
        if sources.base is not None:
            look = Look(sources.base, sources.experts, side, seed, device)
            known, shown = known_details(out), numbers.ranked[:detail]
            found = {m.label: look.into(sources.merges[m.label], m, known) for m in shown}
            statistics = numbers.statistics or look.statistics()
            numbers = replace(numbers, details=found, statistics=statistics)
        _write(folder, numbers)

    return produce(out, record, work)


def _write(folder: Path, numbers: Numbers) -> None:
    from tasks.report.page import draw, render  # noqa: PLC0415  matplotlib: 1 s
    from tasks.report.sections import sections, summary  # noqa: PLC0415

    told = sections(numbers)
    pictures = draw(told)
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    write_text(folder / PAGE, render(numbers.title, summary(numbers), told, pictures))
    write_json(folder / NUMBERS, numbers.as_json())


def known_details(out: Path) -> dict[str, Detail]:
    """Key → what the report in `out` found inside a merge; nothing if it was touched since."""
    last = Lineage.find(out)
    if last is None or dict(last.outputs) != hash_files(out):
        return {}
    details = (Detail(**raw) for raw in read(out / NUMBERS)["details"].values())
    return {detail.key: detail for detail in details}


def _code() -> str:
    """One sha256 over what draws and writes the page."""
    here = Path(__file__).parent
    files = [path for path in sorted(here.rglob("*")) if path.suffix in WRITTEN]
    files.append(here.with_name("paired.py"))
    return digest({path.relative_to(here.parent).as_posix(): sha256(path) for path in files})


def _paths(folders: Mapping[str, Any]) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in folders.items()}
