"""What was put in and what came out: how alike the experts are, how large the updates."""

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from statistics import median

from tasks.report.figures import layers as layer_figures
from tasks.report.figures import solving
from tasks.report.merges import Merge
from tasks.report.numbers import Numbers
from tasks.report.page import Column, Picture, Section, Table


def cosines(numbers: Numbers) -> Section | None:
    """How alike the experts' updates are."""
    if not numbers.statistics:
        return None
    experts, matrix = numbers.statistics["experts"], numbers.statistics["cosines"]
    names = list(experts)
    words = (
        "A cosine of 1 says that two experts changed the same, 0 that they changed different "
        "things, below 0 that one undoes the other."
    )
    pairs = list(combinations(range(len(names)), 2))
    if pairs:
        i, j = max(pairs, key=lambda pair: abs(matrix[pair[0]][pair[1]]))
        words += f" Furthest from 0 are {names[i]} and {names[j]}, {matrix[i][j]:.2f}."
    alt = f"Cosines between the task vectors of {len(names)} experts. {words}"
    caption = "All tensors taken together; the diagonal, which is 1, is left out."
    picture = Picture("cosines", alt, caption, partial(solving.cosines, matrix, names))
    columns = [
        Column("expert", None),
        Column("norm", ".2f"),
        Column("tensors", ".0f"),
        Column("rank", ".0f"),
        Column("effective rank", ".1f"),
        *(Column(name, "z.3f") for name in names),
    ]
    rows = [
        [n, e["norm"], e["tensors"], e["rank"], e["effective_rank"], *matrix[i]]
        for i, (n, e) in enumerate(experts.items())
    ]
    table = Table("What each expert changed, and its cosine with the others", columns, rows)
    return Section("cosines", "How alike the experts are", (words,), (picture,), (table,))


def norms(numbers: Numbers) -> Section | None:
    """How large the merged updates are, beside the experts'."""
    shown = [numbers.merges[label] for label in numbers.details] or list(numbers.ranked[:1])
    series = {merge.label: {m.name: m.merged for m in merge.matrices} for merge in shown}
    first = shown[0]
    ratios = [m.merged / max(m.norms.values()) for m in first.matrices if any(m.norms.values())]
    if not ratios:
        return None
    found = f"that of {first.label} has {median(ratios):.1f} times the norm of the largest expert"
    words = (
        "An update as large as an expert's changes the base as much as that expert did. In the "
        f"median matrix {found}."
    )
    alt = (
        f"Norms of the merged updates in every layer for {', '.join(series)}, a panel for each "
        f"kind of matrix, beside the experts' range. In the median matrix {found}."
    )
    caption = "Frobenius norm of what is added to the base, in units of the weights."
    own = [{m.name: m.norms[e] for m in first.matrices if e in m.norms} for e in first.experts]
    label = "norm of the update"
    draw = partial(layer_figures.lines, numbers, series=series, label=label, band=own)
    pictures = (Picture("norms", alt, caption, draw),) if numbers.has_layers(own[0]) else ()
    table = _each(first, series)
    return Section("norms", "How large the updates are", (words,), pictures, (table,))


def _each(first: Merge, series: Mapping[str, Mapping[str, float]]) -> Table:
    titles = (*series, *(f"expert {name}" for name in first.experts))
    rows = [
        [m.name, *(by.get(m.name) for by in series.values()), *map(m.norms.get, first.experts)]
        for m in first.matrices
    ]
    columns = [Column("matrix", None), *(Column(title, ".3g") for title in titles)]
    return Table("Norms in each matrix", columns, rows, folded=True)
