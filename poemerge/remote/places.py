"""Folders elsewhere, through fsspec: what is in them, bytes of it, and what is put there.

Retries are left to the libraries behind fsspec, which know which of their faults may pass.
"""

import errno
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from poemerge.atomic import DISK
from poemerge.errors import PoemergeError, SourceError, UnreachableError
from poemerge.layout import MODELS, is_ready
from poemerge.names import stays_inside
from poemerge.redaction import carries_secret

URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://.+")
OURS = {"hf", "models", "dvc", "package"}  # whose addresses mean folders here by the time we read
HERE = "file"  # the scheme of what lies on this machine
TAGS = ("ETag", "md5Hash", "etag")  # what S3, Google Cloud Storage and Azure call it
# S3's parts are 50 MiB, and so many of them are held in memory at a time.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    scheme: {"max_concurrency": 4} for scheme in ("s3", "s3a")
}

Span = tuple[str, int, int]  # name of a file, first byte, and the one after the last


class Entry(NamedTuple):
    """A file elsewhere: bytes, and a tag that its storage changes whenever the bytes change."""

    size: int
    tag: str


def is_url(place: Path | str) -> bool:
    """True for a folder that fsspec knows."""
    found = URL.fullmatch(place) if isinstance(place, str) else None
    return found is not None and found["scheme"] not in OURS


def locate(place: Path | str) -> Path | str:
    """A path on this machine, `file://` or plain, or else a URL without a slash at its end."""
    if not is_url(place):
        return Path(place)
    parts = urlsplit(str(place))
    return Path(unquote(parts.path)) if parts.scheme == HERE else str(place).rstrip("/")


def absolute(place: Path | str) -> Path | str:
    """What means the same from every folder of this machine."""
    return place.absolute() if isinstance(place, Path) else place


def is_readable(place: Path | str) -> bool:
    """True if the core can read the folder as it stands, here or elsewhere.

    Raises:
        SourceError: it lies elsewhere, and is closed to us or not there.
    """
    if isinstance(place, Path):
        return is_ready(place)
    return any(name in MODELS for name in Place(place).listing())


def last_part(url: str) -> str:
    """What the folder is called."""
    return url.rpartition("/")[2].strip(".") or "folder"


class Place:
    """A folder elsewhere.

    Args:
        url: that fsspec knows. Who asks, and at which endpoint, is said in the environment or in
            fsspec's configuration, and never here.

    Raises:
        SourceError: the URL holds a secret, or is of a kind that cannot be read here.
    """

    def __init__(self, url: str) -> None:
        if carries_secret(url):
            raise SourceError(
                f"{url} holds a password, a token or a query, and places are recorded with every "
                "model; leave it out, and say who you are in the environment."
            )
        self.url = url
        with explained(url):
            import fsspec.core  # noqa: PLC0415 - what lies here needs none of it

            options = OPTIONS.get(urlsplit(url).scheme, {})
            self._files, self._root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, **options
            )

    def listing(self) -> dict[str, Entry]:
        """Name → what is known of each file, those of sub-folders left out.

        Raises:
            SourceError: there is no such folder, or it is closed.
        """
        with explained(self.url):
            found = self._files.ls(self._root, detail=True)
            beside = self._entries({str(info["name"]): info for info in found})
        return {name: entry for name, entry in beside.items() if "/" not in name}

    def everything(self) -> dict[str, Entry]:
        """The same for all below the folder, by relative path; nothing if it is not there."""
        with explained(self.url):
            self._files.invalidate_cache()
            below = self._entries(self._files.find(self._root, detail=True))
        return {name: entry for name, entry in below.items() if stays_inside(name)}

    def entry(self, name: str) -> Entry | None:
        """What is known of one file, if it is there."""
        with explained(self._at(name)):
            self._files.invalidate_cache()
            with suppress(FileNotFoundError):
                info = self._files.info(self._path(name))
                return self._entries({self._path(name): info}).get(name)
        return None

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Bytes of files, all at a time where the storage allows it; fewer at a file's end."""
        if not spans:
            return []
        names, starts, ends = (list(part) for part in zip(*spans, strict=True))
        with explained(self._at(names[0]) if len(set(names)) == 1 else self.url):
            paths = [self._path(name) for name in names]
            found: list[bytes] = self._files.cat_ranges(paths, starts, ends, on_error="raise")
            return found

    def get(self, name: str, path: Path) -> None:
        """Copy a file to `path`."""
        with explained(self._at(name)):
            self._files.get_file(self._path(name), str(path))

    def put(self, path: Path, name: str) -> Entry:
        """Copy `path` there, in parts where it is large; what the storage knows of it then."""
        with explained(self._at(name)):
            self._files.put_file(str(path), self._path(name))
        entry = self.entry(name)
        if entry is None or entry.size != path.stat().st_size:
            raise UnreachableError(f"{self._at(name)} did not arrive whole; run again.")
        return entry

    def remove(self, names: Collection[str]) -> None:
        """Delete files."""
        if names:
            with explained(self.url):
                self._files.rm([self._path(name) for name in sorted(names)])

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _entries(self, infos: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
        files = {path: info for path, info in infos.items() if info["type"] == "file"}
        start = len(self._path(""))
        return {
            path[start:]: Entry(int(info["size"]), self._tag(path, info))
            for path, info in sorted(files.items())
            if path[start:]
        }

    def _tag(self, path: str, info: Mapping[str, Any]) -> str:
        for key in TAGS:
            if value := info.get(key):
                return f"{key.lower()}:{str(value).strip(chr(34))}"
        return f"ukey:{self._files.ukey(path)}"


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a storage raises into one sentence; nothing that says who asked is in it.

    Raises:
        SourceError: it is not there, or is closed.
        UnreachableError: something else, such as a network that is away.
    """
    try:
        yield
    except PoemergeError:
        raise
    except Exception as error:  # each kind of storage has errors of its own
        if isinstance(error, OSError) and error.filename and error.errno in DISK:
            raise  # of this machine, such as a full disk
        raise _explain(url, error) from error


def _explain(url: str, error: Exception) -> SourceError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        why = f" ({reason})" if " " in reason else ""
        return SourceError(f"{url} does not exist{why}; check the name, or put it there again.")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return SourceError(
            f"{url} is closed to you ({reason}); say who you are in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, say), or ask its owner."
        )
    if isinstance(error, ImportError | ValueError) or "Validation" in type(error).__name__:
        return SourceError(f"{url} cannot be read here ({reason}); see docs/howto/storage.md.")
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return SourceError(f"{url} was refused ({reason}); see that it is as it was, and yours.")
    return UnreachableError(
        f"{url} cannot be reached or broke off ({type(error).__name__}); run again to go on."
    )
