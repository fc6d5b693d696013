"""What a Prefect server refuses, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from poemerge.errors import SettingError
from poemerge.redaction import redact


@contextmanager
def asked() -> Iterator[None]:
    """Run a flow, and say what is wrong with its server in words.

    Raises:
        SettingError: it cannot be reached, does not know who asks, or refused something.
    """
    server = f"Prefect at {redact(PREFECT_API_URL.value() or '')}"
    try:
        yield
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 401:
            message = f"{server} does not know who asks; set PREFECT_API_AUTH_STRING."
        else:
            reason = " ".join(str(error).split())
            message = f"{server} refused ({reason}); mend it, or unset PREFECT_API_URL."
        raise SettingError(message) from error
    except RuntimeError as error:  # Prefect has no class of its own for it
        if "Failed to reach API" not in str(error):
            raise
        message = f"{server} cannot be reached; start it, or unset PREFECT_API_URL."
        raise SettingError(message) from error
