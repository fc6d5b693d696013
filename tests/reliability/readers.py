"""What reads a file of a folder, each by one name."""

from pathlib import Path

from flows.params import read as read_params
from poemerge.checkpoint import Checkpoint
from tasks.evaluate.task_files import find_tasks


def opened(folder: Path) -> None:
    Checkpoint(folder).close()


def parameters(folder: Path) -> None:
    read_params(folder / "params.yaml")


def tasks(folder: Path) -> None:
    find_tasks(["red"], folder, [folder])
