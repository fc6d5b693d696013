"""What a Prefect server refuses, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from poemerge.errors import PoemergeError, SettingError
from poemerge.redaction import redact


class LostError(SettingError):
    """A server that was there when a run began is so no more, and does not know how it ended."""


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """A client of PREFECT_API_URL.

    Raises:
        SettingError: no server is named, or it cannot be reached, or refuses; as `asked`.
    """
    if not PREFECT_API_URL.value():
        raise SettingError("no Prefect server is named; set PREFECT_API_URL, or use --local.")
    with asked(needed=True), get_client(sync_client=True) as client:
        client.raise_for_api_version_mismatch()
        yield client


@contextmanager
def asked(*, needed: bool = False) -> Iterator[None]:
    """Run what a Prefect server is told of, and say what is wrong with the server in words.

    Args:
        needed: True where Prefect's own server, which nobody else can reach, would not do.

    Raises:
        SettingError: it cannot be reached, does not know who asks, or refused something.
        LostError: it went away on the way. If the run failed by itself, that error instead.
    """
    url = PREFECT_API_URL.value()
    server = f"Prefect at {redact(url or '')}"
    instead = "" if needed else ", or unset PREFECT_API_URL"
    if not url:
        from flows.own_server import OwnServer  # noqa: PLC0415 - it takes seconds

        OwnServer()  # which Prefect starts when it needs one
    try:
        yield
    except PrefectHTTPStatusError as error:
        _pass_on(error)
        if error.response.is_server_error:
            raise _lost(f"{server} {_answer(error)}{instead}") from error
        raise SettingError(f"{server} {_answer(error)}{instead}.") from error
    except httpx.TransportError as error:
        _pass_on(error)
        raise _lost(f"{server} does not answer any more; start it{instead}") from error
    except RuntimeError as error:  # Prefect has no class of its own for these
        raise SettingError(_explain(server, error, instead)) from error


def _explain(server: str, error: RuntimeError, instead: str) -> str:
    """Why nothing began, in a sentence; what is somebody else's is raised again."""
    if "Failed to reach API" in str(error):
        cause = error.__cause__
        if isinstance(cause, PrefectHTTPStatusError):
            return f"{server} {_answer(cause)}{instead}."
        return f"{server} cannot be reached; start it{instead}."
    if "incompatible versions" in str(error):
        return f"{server} is of another version ({error}); `poemerge doctor` names both."
    if "ephemeral" in str(error):
        return (
            "Prefect's own server did not start in time; run again, or start one and set "
            "PREFECT_API_URL."
        )
    raise error


def _answer(error: PrefectHTTPStatusError) -> str:
    """What it answered, and what to do."""
    status = error.response.status_code
    if status == httpx.codes.UNAUTHORIZED:
        return "does not know who asks; set PREFECT_API_AUTH_STRING"
    if error.response.is_server_error:
        return f"answers with {status}; see its log"
    reason = " ".join(str(error).split())
    return f"refused ({reason}); mend it"


def _lost(what: str) -> LostError:
    return LostError(f"{what}, and run the same command again: what is done by now is kept.")


def _pass_on(error: BaseException) -> None:
    """Raise what ended the run, if the server's fault is only that it could not be told."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, (PoemergeError, KeyboardInterrupt)):
        cause = cause.__context__
    if cause is not None:
        raise cause
