"""The task_vectors stage: what each expert changed, in numbers; the tensors stay where they are."""

from pathlib import Path

from prefect import task

from poemerge.atomic import write_json
from poemerge.lineage import Lineage, Source, core_code, produce


@task
def task_vectors(base: str, experts: dict[str, str], out: str) -> bool:
    """Write `task_vectors.json`: norms, ranks, pairwise cosines; every value checked to be finite.

    A task vector itself is a view of base and expert; storing it would double the disk.

    Args:
        base: checkpoint folder.
        experts: name → checkpoint or adapter folder.
        out: folder to make.

    Returns:
        True if it was made, False if it was up to date.
    """
    folders = {name: Path(folder) for name, folder in experts.items()}
    inputs = [Source.of(name, folder) for name, folder in {"base": Path(base), **folders}.items()]

    record = Lineage("task_vectors", {}, tuple(inputs), code=core_code())

    def describe(folder: Path) -> None:
        from poemerge.statistics import describe_task_vectors  # noqa: PLC0415 - imports torch

        write_json(folder / "task_vectors.json", describe_task_vectors(Path(base), folders))

    return produce(Path(out), record, describe)
