"""The servers: MLflow, Prefect, the hub. Each answers within seconds, or is said not to."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx

from flows.doctor.finding import Finding, problem, warning
from poemerge.errors import SourceError
from poemerge.redaction import redact
from tasks.tracking import connected, tracking_uri

PATIENCE = 3.0  # seconds to connect, and again to answer
HUB = "https://huggingface.co"
SQLITE = "sqlite:///"
DENIED = {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}


def mlflow() -> Iterator[Finding]:
    """MLFLOW_TRACKING_URI: a server, or a database."""
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        yield _mlflow_server(uri)
    elif not is_made(uri):
        yield Finding("MLflow", f"{uri}: is made by the first run")
    else:
        yield _mlflow_database(uri)


def is_made(uri: str) -> bool:
    """False for a SQLite file that no run has made yet."""
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).exists()


def _mlflow_server(uri: str) -> Finding:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{key}") for key in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    auth = httpx.BasicAuth(user, password or "") if user else None
    answer = ask(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1", auth, token)
    who = f"as {user}" if user else "by token" if token else "anonymously"
    login = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return _judge("MLflow", uri, answer, who=who, login=login, variable="MLFLOW_TRACKING_URI")


def _mlflow_database(uri: str) -> Finding:
    shown = redact(uri)
    try:
        with connected():
            pass
    except SourceError as error:
        return problem("MLflow", str(error), "mend the database, or set MLFLOW_TRACKING_URI")
    file = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not os.access(file, os.W_OK):
        return problem("MLflow", f"{shown} is read-only", "make it writable for you")
    return Finding("MLflow", f"{shown} answers")


def prefect() -> Iterator[Finding]:
    """PREFECT_API_URL, or that of Prefect's profile."""
    from prefect import __version__  # noqa: PLC0415 - 0.8 s, in this check's own thread
    from prefect.settings import PREFECT_API_URL, get_current_settings  # noqa: PLC0415

    url = PREFECT_API_URL.value()
    if not url:
        yield Finding("Prefect", "no server named: every run brings its own; a schedule needs one")
        return
    settings = get_current_settings().api
    secret = settings.auth_string.get_secret_value() if settings.auth_string else ""
    key = settings.key.get_secret_value() if settings.key else None
    user, _, password = secret.partition(":")
    answer = ask(f"{url}/admin/version", httpx.BasicAuth(user, password) if secret else None, key)
    who = "with a password" if secret else "by key" if key else "anonymously"
    login = "set PREFECT_API_AUTH_STRING"
    yield _judge("Prefect", url, answer, who=who, login=login, variable="PREFECT_API_URL")
    if isinstance(answer, httpx.Response) and answer.is_success and answer.json() != __version__:
        said = f"the server is {answer.json()}, this is {__version__}"
        yield warning("Prefect version", said, "give both the same version")


def hub() -> Iterator[Finding]:
    """HF_ENDPOINT, or the hub itself; only `hf://` sources need it."""
    from huggingface_hub import get_token  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415

    named = os.environ.get("HF_ENDPOINT")
    if HF_HUB_OFFLINE:
        yield Finding("hub", "HF_HUB_OFFLINE is set: hf:// sources are refused")
        return
    token = get_token()
    answer = ask(f"{named or HUB}/api/whoami-v2", token=token)
    if isinstance(answer, httpx.Response) and answer.status_code in DENIED and not token:
        yield Finding("hub", f"{redact(named or HUB)} answers, anonymously")
        return
    who = "by HF_TOKEN" if token else "anonymously"
    found = _judge(
        "hub", named or HUB, answer, who=who, login="renew HF_TOKEN", variable="HF_ENDPOINT"
    )
    if found.status == "problem" and not named and isinstance(answer, str):
        found = warning(found.name, found.said, "only hf:// sources need it; see your network")
    yield found


def ask(url: str, auth: httpx.Auth | None = None, token: str | None = None) -> httpx.Response | str:
    """The answer, whatever its status, or why there is none, within seconds."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(url, auth=auth, headers=headers, timeout=PATIENCE)
    except httpx.ConnectError:
        return "cannot be reached"
    except httpx.TimeoutException:
        return f"does not answer in {PATIENCE:.0f} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"is no web address that answers ({type(error).__name__})"


def _judge(
    name: str, url: str, answer: httpx.Response | str, *, who: str, login: str, variable: str
) -> Finding:
    """A finding on a server's answer.

    Args:
        name: of the server.
        url: that was asked.
        answer: of the server, or why there is none.
        who: how we presented ourselves.
        login: what to do where that does not suffice.
        variable: that names the server.
    """
    shown = redact(url)
    if isinstance(answer, str):
        return problem(name, f"{shown} {answer}", f"start it, or correct {variable}")
    if answer.status_code in DENIED:
        return problem(name, f"{shown} refuses us, who came {who}", login)
    if not answer.is_success:
        said = f"{shown} answers with status {answer.status_code}"
        return problem(name, said, f"see its log, or correct {variable}")
    return Finding(name, f"{shown} answers, {who}")
