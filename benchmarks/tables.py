"""Figures as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, width=140)
SIDES = ("ours", "plain", "cached")
SIDES_BY_TOOL = ("ours", "mergekit")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is words, the others are numbers. Nothing if it is empty."""
    if not rows:
        return
    made = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    console.print(made)


def show_solves(result: Mapping[str, Any]) -> None:
    """Print what `benchmarks.solve` measured."""
    rows, rates = result["cases"], result["ceilings"]
    console.print(
        f"\n{result['machine']}, torch {result['torch']}; matmul fp32 "
        f"{rates['float32'] / 1e12:.3g} TFLOP/s, fp64 {rates['float64'] / 1e12:.3g} TFLOP/s; "
        f"copy {rates['bandwidth'] / 1e9:.3g} GB/s"
    )
    ratios = ("plain ×", "cached ×", "steps", "published")
    table("Seconds, and ratios to ours", ("", *SIDES, *ratios), list(map(_times, rows)))
    energies = ("ours", "certificate", "published", "excess", "same")
    table("Energy, of M in fp64", ("", *energies), list(map(_energies, rows)))
    off = [row for row in rows if row["off"]]
    table(
        "Relative distance to the dense fp64 fixed point",
        ("", "ours", "published", "ours, defaults"),
        list(map(_distances, off)),
    )
    shares = (*(f"{side} GFLOP" for side in SIDES), *SIDES, *SIDES)
    table(
        "Work; share of the matmul rate; share of the copy bandwidth",
        ("", *shares),
        list(map(_work, rows)),
    )


def _times(row: Mapping[str, Any]) -> list[str]:
    mark = "" if row["settled"]["published"] else " (no stop)"
    return [
        row["name"],
        *(f"{row['seconds'][side]:.3g}" for side in SIDES),
        *(f"{row['ratio'][side]:.1f}" for side in SIDES[1:]),
        str(row["steps"]["ours"]),
        f"{row['steps']['published']}{mark}",
    ]


def _energies(row: Mapping[str, Any]) -> list[str]:
    energies = [f"{row['energy'][of]:.10g}" for of in ("ours", "certificate", "published")]
    return [row["name"], *energies, f"{row['excess']:.1e}", "yes" if row["same_energy"] else "NO"]


def _distances(row: Mapping[str, Any]) -> list[str]:
    off = row["off"]
    return [row["name"], *(f"{off[of]:.1e}" for of in ("ours", "published", "ours, defaults"))]


def _work(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        *(f"{sum(row['work'][side]['flops'].values()) / 1e9:.4g}" for side in SIDES),
        *(f"{row['share_of_matmul_rate'][side]:.0%}" for side in SIDES),
        *(f"{row['share_of_bandwidth'][side]:.0%}" for side in SIDES),
    ]


def show_processes(result: Mapping[str, Any]) -> None:
    """Print what `benchmarks.process` measured."""
    table(
        "Seconds of the whole process; ratios to ours, and of ours to the floor",
        ("", "ours", "mergekit", "ratio", "over floor"),
        [_process(row, "seconds", 1.0) for row in result["rows"]],
    )
    table(
        "Peak resident memory in MB, mapped files included",
        ("", "ours", "mergekit", "ratio", "over floor", "announced"),
        [[*_process(row, "peak", 1e6), f"{row['announced'] / 1e6:.0f}"] for row in result["rows"]],
    )
    table(
        "Peak anonymous memory in MB, sampled",
        ("", "ours", "mergekit", "ratio", "over floor"),
        [_process(row, "anonymous", 1e6) for row in result["rows"]],
    )
    floor, found = result["floor"], result["task_arithmetic"]
    console.print(
        f"\nfloor: {floor['seconds']:.1f} s, {floor['peak'] / 1e6:.0f} MB resident, "
        f"{floor['anonymous'] / 1e6:.0f} MB anonymous"
    )
    if found:
        console.print(
            f"task_arithmetic against fp64: ours {found['error'][0]:.1e} at most "
            f"({found['ulps'][0]:.2f} units in the last place of bf16), mergekit "
            f"{found['error'][1]:.1e} ({found['ulps'][1]:.2f}); apart by {found['apart']:.1e}"
        )


def _process(row: Mapping[str, Any], key: str, unit: float) -> list[str]:
    return [
        f"{row['method']} (mergekit: {row['against']})",
        *(f"{row[side][key] / unit:{'.1f' if unit == 1.0 else '.0f'}}" for side in SIDES_BY_TOOL),
        f"{row['ratio'][key]:.1f}",
        f"{row['over_floor'][key]:.1f}",
    ]


def show_foreseen(rows: Sequence[Mapping[str, Any]]) -> None:
    """Foreseen and measured, side by side."""
    table = Table(title="what was foreseen, and what it took")
    for name in ("method", "foreseen, s", "measured, s", "ratio", "foreseen, GB", "peak, GB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['foreseen']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['foreseen'] / row['seconds']:.2f}",
            f"{row['announced'] / 1e9:.2f}",
            f"{row['peak'] / 1e9:.2f}",
        )
    console.print(table)
