"""How long a run may take."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.utilities.timeout import timeout

from poemerge.errors import PoemergeError


class OvertimeError(PoemergeError, TimeoutError):
    """A run took longer than it may; Prefect names the state of such a run TimedOut."""


class _ElapsedError(TimeoutError):
    """The time of the block is over; other parts raise TimeoutErrors of their own."""


@contextmanager
def at_most(seconds: int | None) -> Iterator[None]:
    """Stop the block after so many seconds, wherever it is; None lets it run.

    Raises:
        OvertimeError: it was stopped. What had been finished by then is kept.
    """
    try:
        with timeout(seconds, _ElapsedError):
            yield
    except _ElapsedError:
        message = (
            f"The run was stopped after schedule.timeout ({seconds} s); run again to go on from "
            "there, or allow more."
        )
        raise OvertimeError(message) from None
