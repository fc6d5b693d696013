"""Whether the residuals are heavy-tailed, and where a merge is unsure."""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

from tasks.report.figures import layers as layer_figures
from tasks.report.figures import tails as figures
from tasks.report.numbers import Numbers
from tasks.report.page import Column, Picture, Section, Table

FORMULAS = {"output": "Aᵀ(M − A)", "input": "(M − A)Aᵀ"}


def residuals(numbers: Numbers) -> Section | None:
    """Densities and fits under several merges, and what they come to in plain words."""
    described = {label: d.residuals for label, d in numbers.details.items() if d.residuals}
    verdicts = [f"Under {label}: {each['verdict']}" for label, each in described.items()]
    found = {label: each for label, each in described.items() if each["best"]}
    title = "Are the residuals heavy-tailed?"
    if not found:
        return Section("residuals", title, verdicts) if verdicts else None
    first, *_ = found
    best = figures.FAMILIES[found[first]["best"]]
    explained = (
        "A residual is that part of the disagreement between the merged update M and an expert's "
        f"update A which lies along the expert's own directions, {FORMULAS[found[first]['side']]}. "
        "Where its density falls as a straight line on these axes the tail is heavy, and Gaussian "
        "experts would count what lies there for too much."
    )
    alt = (
        f"Densities of residuals with four fits, for {', '.join(found)}, on logarithmic axes. "
        f"Under {first} {best} fits best; a Student-t fit has {found[first]['nu']:.2g} degrees of "
        "freedom."
    )
    caption = "Dots are residuals, lines are fits; the thick line is the most likely."
    pictures = [Picture("residuals", alt, caption, partial(figures.densities, found))]
    pictures += _by_layer(numbers, found)
    tables = (_fits(found), _each(first, found[first]))
    return Section("residuals", title, (explained, *verdicts), pictures, tables)


def uncertainty(numbers: Numbers) -> Section | None:
    """Where the mode is sharp and where it is not."""
    found = {label: d.uncertainty for label, d in numbers.details.items() if d.uncertainty}
    if not found:
        return None
    series = {k: {n: t["relative_std"] for n, t in u["tensors"].items()} for k, u in found.items()}
    first, own = next(iter(series.items()))
    least = max(own, key=lambda name: own[name])
    told = f"{first} is least sure of {least}, {own[least]:.2g}."
    words = (
        "A merge is the mode of a density. Where that is wide, other weights would have done "
        f"nearly as well: the experts do not decide there. {told}"
    )
    alt = (
        f"Relative standard deviation of the merge in every layer for {', '.join(series)}, a panel "
        f"for each kind of matrix. {told}"
    )
    caption = str(found[first]["unit"])
    label = "relative standard deviation"
    draw = partial(layer_figures.lines, numbers, series=series, label=label)
    columns = [Column("matrix", None), *(Column(label, ".3g") for label in series)]
    rows = [[name, *(by.get(name) for by in series.values())] for name in own]
    table = Table("Relative standard deviation in each matrix", columns, rows, folded=True)
    pictures = (Picture("uncertainty", alt, caption, draw),) if numbers.has_layers(own) else ()
    return Section("uncertainty", "Where the merge is unsure", (words,), pictures, (table,))


def _by_layer(numbers: Numbers, found: Mapping[str, Any]) -> list[Picture]:
    """Degrees of freedom and tail indices over the depth, where the matrices have layers."""
    freedom = {k: _known(each, lambda tensor: tensor["nu"]) for k, each in found.items()}
    tails = {k: _known(each, figures.tail_of) for k, each in found.items()}
    told = "1 is a Cauchy density, from about 30 on it is a Gaussian."
    thin = "How fast the largest entries thin out; the smaller, the heavier the tail."
    drawn = (
        ("freedom", freedom, "degrees of freedom ν", told, {"Cauchy": 1.0}),
        ("tail-index", tails, "tail index", thin, {"no variance below": 2.0}),
    )
    return [
        _layered(numbers, name, series, label=label, caption=caption, marks=marks)
        for name, series, label, caption, marks in drawn
        if any(map(numbers.has_layers, series.values()))
    ]


def _layered(
    numbers: Numbers,
    name: str,
    series: Mapping[str, Mapping[str, float]],
    *,
    label: str,
    caption: str,
    marks: Mapping[str, float],
) -> Picture:
    first, own = next((k, by) for k, by in series.items() if by)
    alt = (
        f"{label.capitalize()} of the residuals in every layer for {', '.join(series)}, a panel "
        f"for each kind of matrix. Under {first} the median is {median(own.values()):.2g}."
    )
    draw = partial(layer_figures.lines, numbers, series=series, label=label, marks=marks)
    return Picture(name, alt, caption, draw)


def _known(
    found: Mapping[str, Any], read: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, float]:
    """Matrix → number, of the matrices that have one."""
    numbers = {name: read(tensor) for name, tensor in found["tensors"].items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _fits(found: Mapping[str, Any]) -> Table:
    families = figures.FAMILIES
    columns = [
        Column("merge", None),
        *(Column(name, ".4f") for name in families.values()),
        Column("best", None),
        Column("ν", ".2f"),
        Column("tail index", ".2f"),
        Column("entries", ",.0f"),
    ]
    rows = [
        [
            label,
            *(each["fits"][family]["log_likelihood"] for family in families),
            families[each["best"]],
            *(each["nu"], figures.tail_of(each), each["entries"]),
        ]
        for label, each in found.items()
    ]
    return Table("Mean log-likelihood of an entry in nats: higher is better", columns, rows)


def _each(label: str, found: Mapping[str, Any]) -> Table:
    columns = [
        Column("matrix", None),
        Column("best", None),
        Column("ν", ".2f"),
        Column("tail index", ".2f"),
        Column("scale", ".2e"),
        Column("left out for", None),
    ]
    rows = [
        [
            name,
            figures.FAMILIES.get(each["best"]),
            *(each["nu"], figures.tail_of(each), each["scale"]),
            each["left_out"],
        ]
        for name, each in found["tensors"].items()
    ]
    return Table(f"Residuals in each matrix of {label}", columns, rows, folded=True)
