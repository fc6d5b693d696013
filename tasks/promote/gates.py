"""What a version must show before it goes live: one gate, one question, one sentence.

Scores are fractions of 1. A gate compares two numbers, and `margin` is how far the version is on
the right side of what is wanted; below zero it is on the wrong one.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from tasks.decisions import Gate
from tasks.paired import Outcomes, difference

ROUNDING = 1e-9  # a drop of 5 points is no more than max_drop: 0.05; energies round likewise


def gain(challenger: Outcomes, champion: Outcomes | None, *, min_gain: float, level: float) -> Gate:
    """Is it better than the champion, by more than `min_gain` and more than chance?

    The whole paired interval must lie above `min_gain`. With 0 a version that answers every item
    alike is not promoted, nor one that may be better by luck; a `min_gain` below 0 is what a team
    gives away, with as much certainty, to have newer experts.

    Args:
        challenger: on the test split.
        champion: on the same items; None where nothing is live yet, and there is nothing to gain.
        min_gain: on the mean over tasks, -1 to 1.
        level: of the interval, for instance 0.95.

    Raises:
        SourceError: they were scored on other items.
    """
    if champion is None:
        return Gate("gain", True, min_gain, None, None, "there is no champion to be better than")
    found = difference(challenger, champion, level=level)
    passed = found.low > min_gain
    words = f"{_points(found.mean)} on the mean, {level:.0%} interval {_points(found.low)} to "
    words += f"{_points(found.high)}, {'' if passed else 'not '}all above {_points(min_gain)}"
    return Gate("gain", passed, min_gain, found.low, found.low - min_gain, words)


def drop(challenger: Outcomes, champion: Outcomes | None, *, max_drop: float) -> Gate:
    """Does no task lose more than `max_drop`?

    Args:
        challenger: on the test split.
        champion: on the same items; None where nothing is live yet.
        max_drop: of a task's score, 0 to 1.
    """
    if champion is None:
        return Gate("drop", True, max_drop, None, None, "there is no champion to fall behind")
    losses = {
        task: fmean(champion.values[task]) - fmean(values)
        for task, values in challenger.values.items()
    }
    worst = max(losses, key=losses.__getitem__)
    loss = losses[worst]
    words = f"{worst} loses most, {_points(-loss)}, where {_points(-max_drop)} is allowed"
    if loss <= 0:
        words = "no task loses anything"
    return Gate("drop", loss <= max_drop + ROUNDING, max_drop, loss, max_drop - loss, words)


def certificates(report: Mapping[str, Any]) -> Gate:
    """Was every matrix solved: settled, and with energies that never rose?

    Growth and condition are no part of it, since good merges have both (docs/certificates.md).

    Args:
        report: merge_report.json of the version.
    """
    solved = [tensor for tensor in report.get("tensors", ()) if tensor.get("certificate")]
    failed = [tensor["name"] for tensor in solved if not _holds(tensor["certificate"])]
    held = len(solved) - len(failed)
    words = f"{held} of {len(solved)} solved matrices have a certificate that holds"
    if failed:
        words += f"; {failed[0]} has not: it did not settle, or its energy rose"
    if not solved:
        words = f"{report.get('method', 'its method')} solves nothing that has a certificate"
    return Gate("certificates", not failed, len(solved), held, -len(failed), words)


def intact(name: str, problems: Sequence[str]) -> Gate:
    """Is everything as it was recorded?

    Args:
        name: of the gate.
        problems: a sentence for whatever is missing or changed.
    """
    words = problems[0].rstrip(".") if problems else "everything is as it was recorded"
    if len(problems) > 1:
        words += f" (and {len(problems) - 1} more)"
    return Gate(name, not problems, 0, len(problems), -len(problems), words)


def alike(who: str, apart: str) -> Gate:
    """The version that is champion was asked the same, or was so once it was evaluated anew."""
    words = f"{who} was evaluated anew, for it differed in {apart}" if apart else ""
    return Gate("items", True, 0, 0, 0, words or f"{who} was asked the same")


def unlike(who: str, apart: str, hindrance: str) -> Gate:
    """The refusal to compare a version with one that was asked something else."""
    words = f"{who} was evaluated otherwise ({apart}), and could not be evaluated anew: {hindrance}"
    return Gate("items", False, 0, 1, -1, words.rstrip("."))


def recalled(decision: int, reason: str, version: int) -> Gate:
    """The refusal to promote by itself what a person has taken back."""
    words = f"decision {decision} took it back ({reason}); `poemerge promote --version {version}` "
    return Gate("recall", False, 0, 1, -1, words + "asks for it all the same")


def _holds(certificate: Mapping[str, Any]) -> bool:
    energies = certificate["energies"]
    slack = ROUNDING * max(map(abs, energies), default=0.0)
    return bool(certificate["converged"]) and all(b <= a + slack for a, b in pairwise(energies))


def _points(fraction: float) -> str:
    """A difference of scores, in points of a hundred."""
    return f"{100 * fraction:+.1f}"
