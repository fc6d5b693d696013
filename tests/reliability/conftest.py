"""Figures of the tests here: `--full` tries as often as docs/reliability.md says, and writes it."""

from collections.abc import Iterator

import pytest

from tests.reliability import page
from tests.reliability.trials import Trials

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
