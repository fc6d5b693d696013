"""How the merges came about: whom they listen to, and how their solves went."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean, median

from tasks.report.figures import layers as layer_figures
from tasks.report.figures import solving
from tasks.report.merges import Merge
from tasks.report.numbers import Numbers
from tasks.report.page import Cell, Column, Picture, Section, Table


def weights(numbers: Numbers) -> Section | None:
    """How much each expert decides, of the best merge that reweights them."""
    merge = next((merge for merge in numbers.ranked if merge.is_reweighted), None)
    if merge is None:
        return None
    shares = {m.name: {**dict.fromkeys(merge.experts, 0.0), **m.weights} for m in merge.solved}
    mean = {expert: fmean(by[expert] for by in shares.values()) for expert in merge.experts}
    most = max(mean, key=lambda expert: mean[expert])
    words = (
        f"{merge.label} gives each expert a weight in every matrix: less to one that the others "
        f"contradict. Equal shares would be {1 / len(mean):.2f}. {most} decides most, "
        f"{mean[most]:.2f} on average."
    )
    alt = (
        f"Share of every expert in every layer of {merge.label}, a panel for each kind of matrix. "
        f"{most} has the largest share, {mean[most]:.2f} on average."
    )
    caption = "A full cell is an expert that decides a matrix, an empty one is outvoted there."
    draw = partial(layer_figures.shares, numbers, merge)
    pictures = (Picture("weights", alt, caption, draw),) if numbers.has_layers(shares) else ()
    tables = _share_tables(merge, shares, mean)
    return Section("weights", "Whom the merge listens to", (words,), pictures, tables)


def energy(numbers: Numbers) -> Section | None:
    """How the solves of the reweighted merges went."""
    merges = [merge for merge in numbers.ranked if merge.is_reweighted]
    if not merges:
        return None
    first, labels = merges[0], ", ".join(merge.label for merge in merges)
    steps = [matrix.certificate["steps"] for matrix in first.solved]
    words = (
        "A heavy-tailed merge is found in steps, each of which lowers an energy. Growth is the "
        "size of the merged update over that of the largest expert's."
    )
    alt = (
        f"Energy of every matrix above its end, per step, for {labels}. {first.label} "
        f"took {median(steps):g} steps in the median matrix and {max(steps)} at most."
    )
    caption = f"A line is a matrix. None rises; the end, and all below {solving.FLOOR:g}, is drawn "
    caption += "at the bottom."
    picture = Picture("energy", alt, caption, partial(solving.energy, numbers))
    return Section("energy", "How the solve went", (words,), (picture,), (_solves(merges),))


def _share_tables(
    merge: Merge, shares: dict[str, dict[str, float]], mean: dict[str, float]
) -> tuple[Table, ...]:
    columns = [Column("expert", None), *(Column(c, ".3f") for c in ("mean", "least", "most"))]
    every = {expert: [by[expert] for by in shares.values()] for expert in merge.experts}
    rows: list[list[Cell]] = [
        [expert, mean[expert], min(own), max(own)] for expert, own in every.items()
    ]
    head = f"Shares over the {len(shares)} matrices of {merge.label}"
    each = [Column("matrix", None), *(Column(expert, ".3f") for expert in merge.experts)]
    cells: list[list[Cell]] = [[name, *by.values()] for name, by in shares.items()]
    return (
        Table(head, columns, rows),
        Table(f"Shares in each matrix of {merge.label}", each, cells, folded=True),
    )


def _solves(merges: Sequence[Merge]) -> Table:
    columns = [
        Column("merge", None),
        Column("matrices", ".0f"),
        Column("settled", ".0f"),
        Column("steps, median", ".0f"),
        Column("steps, most", ".0f"),
        Column("growth, median", ".2f"),
        Column("growth, largest", ".2f"),
        Column("condition, largest", ".1e"),
    ]
    return Table("Solves", columns, [_solve(merge) for merge in merges])


def _solve(merge: Merge) -> list[Cell]:
    found = [matrix.certificate for matrix in merge.solved]
    steps, growth = [c["steps"] for c in found], [c["growth"] for c in found]
    return [
        merge.label,
        len(found),
        sum(c["converged"] for c in found),
        median(steps),
        max(steps),
        median(growth),
        max(growth),
        max(c["condition"] for c in found),
    ]
