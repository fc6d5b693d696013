"""What may grow: processes, their memory, handles and threads; temporary files; databases."""

from collections.abc import Iterable
from pathlib import Path

import psutil

from benchmarks.soak.system import FOLDERS, System

MEMORY, HANDLES, THREADS, PROCESSES = "memory, MB", "handles", "threads", "processes"
TEMPORARY, TICKETS, LEFT = "temporary files", "tickets in the queue", "unfinished files"

# What each merge must leave as it found it.
STEADY = (f"worker: {HANDLES}", f"worker: {PROCESSES}", f"server: {PROCESSES}")
STEADY += (TEMPORARY, TICKETS, LEFT)


def gauge(system: System) -> dict[str, float]:
    """All readings now, by name; while no run is under way."""
    readings: dict[str, float] = {}
    for name, process in system.parts.items():
        members = [process, *process.children(recursive=True)]
        readings |= {f"{name}: {what}": value for what, value in _of(members).items()}
    folders = {name: system.root / folder for name, folder in FOLDERS.items()}
    return readings | {
        TEMPORARY: len(_files(folders["TMPDIR"])),
        TICKETS: len(_files(folders["POEMERGE_QUEUE"])),
        LEFT: sum(".partial" in path.as_posix() for path in _files(system.project)),
        "Prefect's database, MB": _megabytes(folders["PREFECT_HOME"].glob("prefect.db*")),
        "MLflow's database, MB": _megabytes(system.project.glob("mlflow.db*")),
        "MLflow's artifacts, MB": _megabytes(_files(system.project / "mlruns")),
        "DVC's cache, MB": _megabytes(_files(system.project / ".dvc/cache")),
        "outputs, MB": _megabytes(_files(system.project / "artifacts")),
    }


def _of(members: list[psutil.Process]) -> dict[str, float]:
    """Memory is what the processes alone hold: the sum counts nothing twice."""
    return {
        MEMORY: sum(member.memory_full_info().uss for member in members) / 1e6,
        HANDLES: sum(member.num_fds() for member in members),
        THREADS: sum(member.num_threads() for member in members),
        PROCESSES: len(members),
    }


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _megabytes(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6
