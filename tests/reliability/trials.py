"""Trials: one claim tried many times, with a count of how often it held."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Trials:
    """How often a claim was tried, and where it did not hold.

    Attributes:
        full: try as often as the published figures say, and not only as a quick test does.
        claim: what is tried, in words, for the table.
        tried: so far.
        failures: number of the trial → what went wrong.
    """

    full: bool
    claim: str = ""
    tried: int = 0
    failures: dict[int | str, str] = field(default_factory=dict)

    def __call__(self, *, short: int, full: int) -> Iterator[int]:
        """The numbers of all trials; each seeds what is random in its own.

        Args:
            short: how many, in a quick test.
            full: how many, for the published figures.
        """
        yield from range(full if self.full else short)

    @contextmanager
    def trial(self, number: int | str) -> Iterator[None]:
        """Count what happens inside; what fails is kept, and the next trial goes on.

        Args:
            number: by which this trial can be found and run again.
        """
        self.tried += 1
        try:
            yield
        except Exception:  # noqa: BLE001 - whatever it is, the claim did not hold
            self.failures[number] = traceback.format_exc()

    def settle(self) -> None:
        """Fail if one trial did."""
        assert self.tried, "nothing was tried"
        told = "\n".join(f"trial {number}: {text}" for number, text in self.failures.items())
        assert not self.failures, f"{len(self.failures)} of {self.tried} did not hold\n{told}"
