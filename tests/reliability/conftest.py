"""Figures of the tests here: `--full` tries as often as docs/reliability.md says, and writes it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

from tests.reliability import page
from tests.reliability.trials import Trials
from tests.servers import prefect_server

if TYPE_CHECKING:
    from tests.reliability.contest import Arena

KEY = "trials"


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Counts for this test; the first line of its docstring is the claim."""
    claim = (request.function.__doc__ or "").partition("\n")[0]
    assert claim, "say in the docstring what is tried"
    found = Trials(request.config.getoption("--full"), claim)
    yield found
    held = found.tried - len(found.failures)
    request.node.user_properties.append((KEY, (claim, found.tried, held)))
    found.settle()


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> None:
    """For what takes minutes: tried with `--full` alone."""
    if not request.config.getoption("--full"):
        pytest.skip("with --full")


@pytest.fixture
def in_time() -> Iterator[None]:
    """For what does not take long, unless it hangs."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect server."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="session")
def arena(prefect: str) -> "Arena":
    """Where commands start at the same moment, which report to that server."""
    from tests.reliability.contest import Arena

    return Arena({"PREFECT_API_URL": prefect})


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    """A project before its first run; for reading only."""
    from tests.reliability.projects import new_project

    return new_project(tmp_path_factory.mktemp("projects") / "fresh", zoo)


@pytest.fixture(scope="session")
def finished(fresh: Path, arena: "Arena") -> Path:
    """The same after a run that nobody disturbed; for reading only."""
    from tests.reliability.contest import Command
    from tests.reliability.projects import copy

    folder = copy(fresh, fresh.with_name("finished"))
    (ended,) = arena.contend([Command(("run",), folder)], folder.with_name("log"))
    assert ended.code == 0, ended.said
    return folder


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table of what was tried; with `--full`, in the docs too."""
    rows = [
        page.Row(report.nodeid.partition("::")[0], *figures)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for key, figures in report.user_properties
        if key == KEY
    ]
    for row in rows:
        terminalreporter.write_line(f"{row.held} of {row.tried} held: {row.claim}")
    if rows and config.getoption("--full"):
        page.keep(rows)
