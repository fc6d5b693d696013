"""What a Prefect server refuses, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from poemerge.errors import PoemergeError, SettingError
from poemerge.redaction import redact


class LostError(SettingError):
    """A server that was there when a run began is so no more, and does not know how it ended."""


@contextmanager
def asked() -> Iterator[None]:
    """Run a flow, and say what is wrong with its server in words.

    Raises:
        SettingError: it cannot be reached, does not know who asks, or refused something.
        LostError: it went away on the way. If the run failed by itself, that error instead.
    """
    url = PREFECT_API_URL.value()
    server = f"Prefect at {redact(url or '')}"
    if not url:
        from flows.own_server import OwnServer  # noqa: PLC0415 - it takes seconds

        OwnServer()  # which Prefect starts when it needs one
    try:
        yield
    except PrefectHTTPStatusError as error:
        _pass_on(error)
        if error.response.status_code == 401:
            message = f"{server} does not know who asks; set PREFECT_API_AUTH_STRING."
        elif error.response.is_server_error:
            raise _lost(server, f"answers with {error.response.status_code}") from error
        else:
            reason = " ".join(str(error).split())
            message = f"{server} refused ({reason}); mend it, or unset PREFECT_API_URL."
        raise SettingError(message) from error
    except httpx.TransportError as error:
        _pass_on(error)
        raise _lost(server, "does not answer any more") from error
    except RuntimeError as error:  # Prefect has no class of its own for these
        if "Failed to reach API" in str(error):
            message = f"{server} cannot be reached; start it, or unset PREFECT_API_URL."
        elif "ephemeral" in str(error):
            message = "Prefect's own server did not start in time; run again, or start one and set "
            message += "PREFECT_API_URL."
        else:
            raise
        raise SettingError(message) from error


def _lost(server: str, how: str) -> LostError:
    return LostError(
        f"{server} {how}; start it, or unset PREFECT_API_URL, and run the same command again: "
        "what is done by now is kept."
    )


def _pass_on(error: BaseException) -> None:
    """Raise what ended the run, if the server's fault is only that it could not be told."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, (PoemergeError, KeyboardInterrupt)):
        cause = cause.__context__
    if cause is not None:
        raise cause
