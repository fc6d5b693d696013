"""Who is best, by how much, and whether that is more than chance."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tasks.paired import LEVEL, RESAMPLES
from tasks.report.figures import scores as figures
from tasks.report.numbers import Candidate, Numbers
from tasks.report.page import Cell, Column, Picture, Section, Summary, Table


def summary(numbers: Numbers) -> Summary:
    """The winner, or the one merge that the report is about."""
    merge = numbers.merges[numbers.best]
    warnings = {m.label: m.warnings for m in numbers.ranked if m.warnings}
    settings = {k: _short(v) for k, v in merge.settings.items() if v not in ("", {})}
    facts = {"method": merge.method, "experts": str(len(merge.experts))}
    if not numbers.candidates:
        facts |= {f"tensors, {rule}": str(count) for rule, count in merge.rules.items()}
        headline = f"{merge.label}: {len(merge.experts)} experts merged"
        return Summary(headline, (), facts, settings, warnings)
    best = numbers.of("merge")[0]
    facts["mean test score"] = f"{_percent(best.mean.mean)} %"
    facts[f"{100 * LEVEL:.0f} % interval"] = _span(best)
    if best.kept is not None:
        facts["of the experts’ scores"] = f"{_percent(best.kept)} %"
    headline = f"{best.label} is the best of {len(numbers.merges)} merges"
    return Summary(headline, (_verdict(numbers),), facts, settings, warnings)


def leaderboard(numbers: Numbers) -> Section | None:
    """Means with intervals, and the differences from the best."""
    if not numbers.candidates:
        return None
    best, *others = numbers.of("merge")
    ties = [row.label for row in others if not _is_behind(row)]
    explained = (
        f"Scores are on the test split, {numbers.items} items; the best merge was chosen on the "
        f"validation split, so another may score higher here. Intervals hold {100 * LEVEL:.0f} % "
        f"of {RESAMPLES:,} bootstrap resamples of the items."
    )
    told = f"Not told apart from {best.label} by these items: {', '.join(ties)}."
    words = (explained, told if ties else f"{best.label} is really ahead of all others.")
    alt = (
        f"Mean test scores of {len(numbers.merges)} merges and the base, each a dot with its "
        f"interval. {best.label} has {_percent(best.mean.mean)} per cent, from {_span(best)}."
    )
    caption = (
        "A hollow dot is really behind the best: the interval of the difference, taken item by "
        "item, leaves out zero (95 %, all differences together). A full dot may be as good."
    )
    picture = Picture("leaderboard", alt, caption, partial(figures.leaderboard, numbers))
    return Section("leaderboard", "Which merge is best", words, (picture,), (_board(numbers),))


def tasks(numbers: Numbers) -> Section | None:
    """Every task of every merge."""
    if not numbers.candidates:
        return None
    own, best = figures.own_scores(numbers), numbers.of("merge")[0]
    gaps = {task: best.scores[task] - own[task] for task in numbers.tasks if task in own}
    words = (
        "The cells hold test scores in per cent. Colour says how far a merge is from the expert "
        "that was trained for the task, whose score is what there is to keep."
    )
    alt = f"Test scores of {len(numbers.merges)} merges on {len(numbers.tasks)} tasks."
    if gaps:
        worst = min(gaps, key=lambda task: gaps[task])
        alt += f" {best.label} is furthest from the task's own expert on {worst}: "
        alt += f"{100 * gaps[worst]:+.1f} points."
    caption = "A column shows what a task loses, a row what a merge gives up for it."
    picture = Picture("heatmap", alt, caption, partial(figures.heatmap, numbers))
    return Section("tasks", "Which tasks a merge keeps", (words,), (picture,), (_scores(numbers),))


def _board(numbers: Numbers) -> Table:
    titles = ("mean", "from", "to", "of the experts’", "behind the best", "at least", "at most")
    columns = [Column("candidate", None), *map(Column, titles), Column("difference", None)]
    rows = [_board_row(row) for row in (*numbers.of("merge"), *numbers.of("base"))]
    caption = "Mean test scores in per cent, and how many points they are behind the best"
    return Table(caption, columns, rows)


def _board_row(row: Candidate) -> list[Cell]:
    mean, behind = row.mean, row.behind
    scores = [mean.mean, mean.low, mean.high, row.kept]
    gaps = [behind.mean, behind.low, behind.high] if behind else [None] * 3
    said = ("real" if behind.is_real else "may be chance") if behind else "–"
    return [row.label, *(None if x is None else 100 * x for x in (*scores, *gaps)), said]


def _scores(numbers: Numbers) -> Table:
    columns = [Column("candidate", None), *map(Column, numbers.tasks)]
    every = (*numbers.of("merge"), *numbers.of("base"), *numbers.of("expert"))
    rows = [
        [row.label, *(100 * row.scores[t] if t in row.scores else None for t in numbers.tasks)]
        for row in every
    ]
    return Table("Test scores in per cent; an expert is scored on its own task", columns, rows)


def _verdict(numbers: Numbers) -> str:
    """What is known of the winner in a sentence."""
    others, (base,) = numbers.of("merge")[1:], numbers.of("base")
    real = sum(map(_is_behind, others))
    words = "It was chosen on validation."
    if others:
        words += f" On test it is really ahead of {real} of the {len(others)} others"
    if base.behind is not None:
        gap = 100 * base.behind.mean
        words += f"{', and' if others else ' On test it is'} {abs(gap):.1f} points "
        words += "above the base" if gap >= 0 else "below the base"
    return words.removesuffix(".") + "."


def _is_behind(row: Candidate) -> bool:
    return row.behind is not None and row.behind.low > 0


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _span(row: Candidate) -> str:
    return f"{_percent(row.mean.low)} to {_percent(row.mean.high)}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_short(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
