"""Promotion with a person who must agree: asked in Prefect, who may decline or never answer."""

import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.promote import promote_with_approval
from tasks import promote
from tests.flows.promoting import call, set_gate
from tests.reliability.proxy import Fault, proxy
from tests.servers import free_port
from tests.tasks.registry import NAME, aliases

PATIENCE = 180  # s, of a busy machine
pytestmark = pytest.mark.usefixtures("prefect")


def kinds() -> list[str]:
    ledger = promote.audit(NAME)
    assert ledger.problems == ()
    return [row.decision.kind for row in ledger.rows if not row.void]


def test_approval_needs_a_server(registry: None) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done = call("promote", "--approve")
    assert done.exit_code == 1
    assert "needs a Prefect server" in done.output
    assert kinds() == ["promotion"]


def answer(**given: Any) -> threading.Thread:
    """A person who looks into Prefect until a run waits, and resumes it."""
    return when_paused(lambda client, run: client.resume_flow_run(run, run_input=given))


def when_paused(act: Callable[[SyncPrefectClient, UUID], object]) -> threading.Thread:
    """Do something as soon as a run, other than those that were left so, waits for a person."""
    paused = FlowRunFilter(state={"type": {"any_": ["PAUSED"]}})
    with get_client(sync_client=True) as client:
        left = {run.id for run in client.read_flow_runs(flow_run_filter=paused)}

    def watch() -> None:
        end = time.monotonic() + PATIENCE
        with get_client(sync_client=True) as client:
            while time.monotonic() < end:
                for run in client.read_flow_runs(flow_run_filter=paused):
                    if run.id not in left:
                        act(client, run.id)
                        return
                time.sleep(0.2)

    thread = threading.Thread(target=copy_context().run, args=(watch,))
    thread.start()
    return thread


def test_a_person_agrees(registry: None) -> None:
    person = answer(approve=True, who="a reviewer", reason="read it")
    outcome = promote_with_approval("params.yaml", None, "", PATIENCE)
    person.join()
    assert outcome["kind"] == "promotion"
    assert outcome["reason"] == "approved by a reviewer: read it"
    assert kinds() == ["promotion", "approval", "promotion"]
    assert promote.audit(NAME).rows[1].decision.who == "a reviewer"
    assert aliases()["champion"] == 2


def test_a_person_declines(registry: None) -> None:
    person = answer(approve=False, who="a reviewer", reason="too terse")
    outcome = promote_with_approval("params.yaml", None, "", PATIENCE)
    person.join()
    assert (outcome["kind"], outcome["who"]) == ("rejection", "a reviewer")
    assert kinds() == ["promotion", "rejection"]
    assert aliases()["champion"] == 1


def test_nobody_answers(registry: None) -> None:
    done = call("promote", "--approve", "--timeout", "3")
    assert done.exit_code == 1
    assert "nobody answered in 3 s" in " ".join(done.output.split())
    assert "to resume http://127.0.0.1" in " ".join(done.output.split())
    assert kinds() == ["promotion", "rejection"]
    assert aliases()["champion"] == 1


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [("dropped", "does not answer any more; start it, and run"), (500, "answers with 500; see")],
)
def test_a_server_that_goes_away_while_it_waits_changes_nothing(
    registry: None, fault: Fault, sentence: str
) -> None:
    real = str(PREFECT_API_URL.value())
    with proxy(real) as (between, address):
        # One retry, for a server in much use may answer with 503 of itself.
        here = {PREFECT_API_URL: f"{address}/api", PREFECT_CLIENT_MAX_RETRIES: 1}
        away = when_paused(lambda *_: between.fail(fault, 0, 10**9))
        with temporary_settings(here):
            done = call("promote", "--approve", "--timeout", str(PATIENCE))
        away.join()
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: Prefect at {address}/api {sentence}")
    assert "Traceback" not in done.output
    assert kinds() == ["promotion"]
    assert aliases()["champion"] == 1


def test_a_server_that_is_not_there_is_one_sentence(registry: None) -> None:
    here = {PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(here):
        done = call("promote", "--approve")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("/api cannot be reached; start it.")
    assert kinds() == ["promotion"]


def test_nobody_is_asked_about_what_the_gates_refuse(registry: None) -> None:
    set_gate(min_gain=0.5)
    assert promote_with_approval("params.yaml", None, "", 1)["kind"] == "refusal"
