"""What a check finds."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        said: how it is.
        status: `warning` for what works and may surprise, `problem` for what will fail.
        advice: what to do, unless it is well.
    """

    name: str
    said: str
    status: Status = "ok"
    advice: str = ""


def warning(name: str, said: str, advice: str) -> Finding:
    """It works, and may surprise."""
    return Finding(name, said, "warning", advice)


def problem(name: str, said: str, advice: str) -> Finding:
    """It will fail."""
    return Finding(name, said, "problem", advice)
