"""What a report says: numbers in, words with pictures and tables out."""

from collections.abc import Callable

from tasks.report.numbers import Numbers
from tasks.report.page import Section
from tasks.report.sections import inside, scores, tails, updates
from tasks.report.sections.scores import summary

__all__ = ["sections", "summary"]

TELL: tuple[Callable[[Numbers], Section | None], ...] = (
    scores.leaderboard,
    scores.tasks,
    tails.residuals,
    inside.weights,
    inside.energy,
    updates.cosines,
    updates.norms,
    tails.uncertainty,
)


def sections(numbers: Numbers) -> list[Section]:
    """All that there is something to say about, in order."""
    return [section for tell in TELL if (section := tell(numbers)) is not None]
