"""What a Prefect server does to a run, as one sentence; tests/reliability has a real one."""

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from flows.prefect_server import LostError, asked
from poemerge.errors import SettingError, SourceError

TIMED_OUT = "Timed out while attempting to connect to ephemeral Prefect API server."


def answer(status: int) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://127.0.0.1:9/api/flow_runs/")
    return PrefectHTTPStatusError("no", request=request, response=httpx.Response(status))


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (httpx.ConnectError("gone"), LostError, "does not answer any more; start it, or unset"),
        (httpx.ReadTimeout("late"), LostError, "does not answer any more; start it, or unset"),
        (answer(500), LostError, "answers with 500; see its log, or unset"),
        (answer(401), SettingError, "does not know who asks; set PREFECT_API_AUTH_STRING"),
        (answer(422), SettingError, r"refused \(no\); mend it"),
        (RuntimeError("Failed to reach API at x"), SettingError, "cannot be reached; start it"),
        (RuntimeError(TIMED_OUT), SettingError, "own server did not start in time; run again"),
        (RuntimeError("of somebody else"), RuntimeError, "of somebody else"),
    ],
)
def test_its_fault_is_one_sentence(error: Exception, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence), asked():
        raise error


@pytest.mark.parametrize("own", [SourceError("its own end"), KeyboardInterrupt()])
@pytest.mark.parametrize("lost", [httpx.ConnectError("gone"), answer(503)])
def test_what_ended_the_run_is_told_before_it(own: BaseException, lost: Exception) -> None:
    def run() -> None:
        try:
            raise own
        finally:
            raise lost

    with pytest.raises(type(own)) as caught, asked():
        run()
    assert caught.value is own
