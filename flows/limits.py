"""How long a run may take."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.utilities.timeout import timeout

from poemerge.errors import PoemergeError

AGAIN = 1  # seconds


class OvertimeError(PoemergeError, TimeoutError):
    """A run took longer than it may; Prefect names the state of such a run TimedOut."""


class _ElapsedError(TimeoutError):
    """The time of the block is over; other parts raise TimeoutErrors of their own."""


class _Alarm(BaseException):
    """What interrupts the block: no error, which a library may take for one of its own."""


@contextmanager
def at_most(seconds: int | None) -> Iterator[None]:
    """Stop the block after so many seconds, wherever it is; None lets it run.

    Raises:
        OvertimeError: it was stopped. What had been finished by then is kept.
    """
    in_main = threading.current_thread() is threading.main_thread()
    try:
        with _alarm(seconds) if seconds and in_main else timeout(seconds, _ElapsedError):
            yield
    except (_Alarm, _ElapsedError):
        message = (
            f"The run was stopped after schedule.timeout ({seconds} s); run again to go on from "
            "there, or allow more."
        )
        raise OvertimeError(message) from None


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise in the block when the time is over, and again where that came to nothing.

    Python drops what is raised in a destructor, and a library may drop what it catches. What is
    still on its way is left alone, or it would disturb what is put in order behind it.
    """

    def ring(_number: int, _frame: object) -> None:
        if not any(isinstance(error, _Alarm) for error in _handled()):
            raise _Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it may ring until then, and no more below
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _handled() -> Iterator[BaseException]:
    """The exception that is handled just now, and those in whose handling it came."""
    error = sys.exception()
    while error is not None:
        yield error
        error = error.__context__
