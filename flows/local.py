"""Prefect on this machine: a server on loopback and a worker, until somebody stops them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psutil
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.watch import ending_with_us
from poemerge.errors import SettingError, SourceError

DEFAULT = "http://127.0.0.1:4200/api"
LOG = Path(".poemerge/log/prefect-server.log")
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
PATIENCE = 180.0  # seconds that a server may take to answer: the first time it makes its database
GRACE = 20.0  # seconds that a process may take to end before it is killed
PAUSE = 0.5  # seconds between two looks
STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def server() -> Iterator[subprocess.Popen[bytes] | None]:
    """Prefect's server at PREFECT_API_URL, or at its usual port; started where none answers.

    Yields:
        Its process, None where it was running already.

    Raises:
        SettingError: PREFECT_API_URL names another machine.
        SourceError: the server ended or does not answer; its log says why.
    """
    url = PREFECT_API_URL.value() or DEFAULT
    if urlsplit(url).hostname not in LOOPBACK:
        message = "PREFECT_API_URL names another machine; unset it, or leave --local out."
        raise SettingError(message)
    with temporary_settings({PREFECT_API_URL: url}), ExitStack() as stack:
        if _answers():
            yield None
            return
        LOG.parent.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(LOG.open("wb"))
        address = ["--host", str(urlsplit(url).hostname), "--port", str(urlsplit(url).port or 80)]
        environment = {"PREFECT_UI_API_URL": url, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"}
        process = stack.enter_context(
            _running(["server", "start", *address], environment, output=log.fileno())
        )
        _await(process)
        yield process


@contextmanager
def worker(pool: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of `pool` in the working directory, its lines in this terminal."""
    url = str(PREFECT_API_URL.value())
    environment = {"PREFECT_API_URL": url, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"}
    with _running(["worker", "start", "--pool", pool, "--type", "process"], environment) as process:
        yield process


@contextmanager
def foreground() -> Iterator[None]:
    """End quietly at Ctrl-C or SIGTERM, which end whatever is inside.

    Set even where a shell has SIGINT ignored, as for a job in its background: what is started here
    would inherit that, and a worker ends by SIGINT.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOPS}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        _restore(before)


def wait(processes: Mapping[str, subprocess.Popen[bytes] | None]) -> NoReturn:
    """Wait for the end of the foreground.

    Args:
        processes: what must live meanwhile, by name.

    Raises:
        KeyboardInterrupt: somebody stops this process.
        SourceError: one of them ended by itself.
    """
    while True:
        for name, process in processes.items():
            if process is not None and process.poll() is not None:
                message = f"the {name} ended with code {process.returncode}; see above and {LOG}."
                raise SourceError(message)
        time.sleep(PAUSE)


@contextmanager
def _running(
    arguments: Sequence[str], environment: Mapping[str, str], output: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Prefect in a session of its own, for Ctrl-C is ours to deal with."""
    process = subprocess.Popen(  # noqa: S603 - no shell, and no word from elsewhere
        [sys.executable, "-m", "prefect", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        with ending_with_us(process.pid):
            yield process
    finally:
        with _uninterrupted():
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; a flow run has a session of its own."""
    told: set[psutil.Process] = set()
    deadline = time.monotonic() + GRACE
    while process.poll() is None and time.monotonic() < deadline:
        for member in _family(process.pid) - told:
            _signal(member, signal.SIGTERM)
            told.add(member)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PAUSE)
    _, left = psutil.wait_procs(told | _family(process.pid), PAUSE)
    for member in left:
        _signal(member, signal.SIGKILL)
    process.wait()


def _family(pid: int) -> set[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return {parent, *parent.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):  # psutil knows one process from another of the same id
        process.send_signal(number)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half of it running."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _answers() -> bool:
    with get_client(sync_client=True) as client:
        return client.api_healthcheck() is None


def _await(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not _answers():
        if process.poll() is not None:
            raise SourceError(f"Prefect's server could not start; {LOG} says why.")
        if time.monotonic() > deadline:
            raise SourceError(f"Prefect's server gave no answer in {PATIENCE:.0f} s; see {LOG}.")
        time.sleep(PAUSE)
