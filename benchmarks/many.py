"""Many experts, many tensors, many bytes: processor seconds and peak memory.

python -m benchmarks.many
python -m benchmarks.many --only tensors
"""

from collections.abc import Iterable
from pathlib import Path

from benchmarks.parts import run_parts
from benchmarks.tables import table
from tests.reliability.many import HUGE, adapters, full_experts, mixture, sparse
from tests.reliability.work import CLI, Usage, Work, child

EXPERTS = 200
METHODS = ("average", "ties", "tsv_m", "gaussian_poe", "cauchy_poe")
SIZES = (1250, 2500, 5000)
STEPS = ("check", "merge", "lineage", "verify", "report")
MERGE = """
import sys
from poemerge import merge_checkpoints
base, out, method, *experts = sys.argv[1:]
merge_checkpoints(base, experts, out, method, "cpu")
"""


def experts(root: Path) -> None:
    """All methods on adapters and on full fine-tunes in two shards, with 256 file handles."""
    base, full = full_experts(root, EXPERTS)
    rows = []
    for kind, folders in (("LoRA", adapters(root, EXPERTS)), ("full", full)):
        for method in METHODS:
            used = child(MERGE, base, root / f"{kind}-{method}", method, *folders)
            rows.append([f"{method}, {kind}", *_cells(used)])
    table(f"{EXPERTS} experts of 4 tensors", ("", "s", "MB"), rows)


def tensors(root: Path) -> None:
    """A mixture's names, two experts, every step in this process."""
    rows = []
    Work(root / "first", mixture(100)).all(STEPS)  # for what is imported then
    for size in SIZES:
        took = Work(root / str(size), mixture(size)).all(STEPS)
        page = root / str(size) / "report/index.html"
        rows.append([f"{size}", *(f"{s:.2f}" for s in took), f"{page.stat().st_size / 1e6:.1f}"])
    table("Seconds by number of tensors", ("", *STEPS, "page, MB"), rows)


def gigabytes(root: Path) -> None:
    """A base and two experts of 21 GB each, all header."""
    folders = [sparse(root / name, HUGE) for name in ("base", "a", "b")]
    base, *others = folders
    given = [word for other in others for word in ("--expert", other)]
    used = child(CLI, "check", "--base", base, *given, "--device", "cpu")
    columns = ("", "s", "MB", "read, MB")
    table(
        "`poemerge check` of 64 GB", columns, [["check", *_cells(used), f"{used.read / 1e6:.0f}"]]
    )


def _cells(used: Usage) -> Iterable[str]:
    return f"{used.seconds:.1f}", f"{used.peak / 1e6:.0f}"


if __name__ == "__main__":
    run_parts(__doc__, experts, tensors, gigabytes)
