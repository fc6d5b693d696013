"""Addresses as they may be shown."""

from urllib.parse import urlsplit, urlunsplit


def without_secret(url: str) -> str:
    """`url` without user, password, query and fragment, in which secrets travel."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return f"{shown}?…" if parts.query else shown
