"""What must not be told: passwords, tokens and keys, in whatever text they turn up.

This is the one place that knows them. Every error of poemerge passes through it (errors.py), and
every log line and traceback of the process once `guard_logs` was called.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

GONE = "…"
# Who asks, before the host of an address. Our own schemes have a revision there: dvc://path@main.
OURS = "".join(f"(?<!{scheme})" for scheme in ("hf", "dvc", "models", "package"))
USER = re.compile(rf"""(?:{OURS}://[^/\s'"]*|://[^/\s'"]*:[^/\s'"]*)@""")
QUERY = re.compile(r"""(\w://[^\s?#'"]*)\?[^\s'")]+|(?<=\S)\?[\w.%-]+=[^\s'")]*""")
HEADER = re.compile(r"(authorization\W+\w+\s+)[^\s'\"]+", re.IGNORECASE)
ISSUED = re.compile(r"\b(?:(?:hf|pnu|pnb|ghp)_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})\b")
VARIABLE = re.compile(
    r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|KEY|AUTH|CREDENTIALS?|NOTIFY)(_|$)", re.IGNORECASE
)
PASSWORD = re.compile(r"(?:://|^)[^/\s@:]*:([^/\s]+?)(?:@|$)")
LEAST = 8  # letters of a secret; a shorter one would be found in innocent words


def redact(text: str) -> str:
    """`text` without what is secret in it.

    That is user, password and query of addresses, headers that say who asks, tokens of known form,
    and whatever stands in environment variables named like a token, a password or a key.
    """
    return _without_addresses(_without_known(text))


def carries_secret(text: str) -> bool:
    """True for an address with a password or a query, or a token: it must not be recorded."""
    return _without_addresses(text) != text


def guard_logs() -> None:
    """See that no log line of this process, whoever writes it, and no traceback tells a secret."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Discreet):
        logging.setLogRecordFactory(_Discreet(make))
        sys.excepthook = _print_error


class _Discreet:
    """Makes log records whose text is safe, before any handler sees them."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **kwargs)
        try:
            said = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: the handler will say so
            return record
        safe = redact(said)
        if safe != said:
            record.msg, record.args = safe, ()
        if record.exc_info and record.exc_info[0]:
            told = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            if (safe := redact(told)) != told:  # in place of what handlers would make of the error
                record.exc_text, record.exc_info = safe, None
        return record


def _print_error(*error: Any) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(*error))))


def _without_addresses(text: str) -> str:
    text = QUERY.sub(lambda found: f"{found[1] or ''}?{GONE}", USER.sub("://", text))
    return ISSUED.sub(GONE, HEADER.sub(rf"\1{GONE}", text))


def _without_known(text: str) -> str:
    for value in sorted(set(_known()), key=len, reverse=True):
        text = text.replace(value, GONE)
    return text


def _known() -> Iterator[str]:
    """Secrets of the environment: whole values, and the passwords in `user:password` and URLs."""
    for name, value in os.environ.items():
        secret = VARIABLE.search(name) and not os.path.exists(value)  # noqa: PTH110 - or too long
        words = [value] if secret else []
        if secret or "://" in value:
            words += PASSWORD.findall(value)
        yield from (word for word in words if len(word) >= LEAST)
