"""The time that a run may take, wherever in it the time is over."""

import signal
import threading
import time
from contextlib import suppress

import pytest

from flows.limits import OvertimeError, at_most

LONG = 60  # seconds; no test takes them


class Destroyed:
    """Takes its time to go, in which an exception comes to nothing."""

    def __del__(self) -> None:
        time.sleep(1.5)


def test_a_block_is_stopped() -> None:
    with (
        pytest.raises(OvertimeError, match=r"after schedule.timeout \(1 s\); run again"),
        at_most(1),
    ):
        time.sleep(LONG)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_came_to_nothing_rings_again() -> None:
    def drop_twice() -> None:
        Destroyed()
        with suppress(BaseException):
            time.sleep(LONG)
        time.sleep(LONG)

    with pytest.raises(OvertimeError), at_most(1):
        drop_twice()


def test_what_puts_things_in_order_is_not_disturbed() -> None:
    ended = []

    def work() -> None:
        try:
            time.sleep(LONG)
        finally:
            time.sleep(2.5)
            ended.append(True)

    with pytest.raises(OvertimeError), at_most(1):
        work()
    assert ended


def test_in_a_thread_too() -> None:
    said: list[str] = []

    def work() -> None:
        try:
            with at_most(1):
                for _ in range(LONG * 10):
                    time.sleep(0.1)
        except OvertimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "after schedule.timeout (1 s)" in said[0]


@pytest.mark.parametrize("seconds", [None, LONG])
def test_nothing_rings_afterwards(seconds: int | None) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with at_most(seconds):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_alarm_at_the_very_end_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = signal.getsignal(signal.SIGALRM), signal.setitimer

    def late(which: int, seconds: float, again: float = 0) -> tuple[float, float]:
        if not seconds and not rung:
            rung.append(True)
            signal.raise_signal(signal.SIGALRM)
        return real(which, seconds, again)

    rung: list[bool] = []
    monkeypatch.setattr(signal, "setitimer", late)
    with pytest.raises(OvertimeError), at_most(LONG):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before
