"""A real S3-compatible server on loopback, with a bucket for each test."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from tests.reliability.proxy import Proxy, proxy

SECRET = "the-secret-key-of-whoever-tests"
USER = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
ENDPOINT = "AWS_ENDPOINT_URL"

_numbers = count()


@dataclass(frozen=True)
class Storage:
    """A bucket.

    Attributes:
        server: that serves it.
        bucket: its name.
        files: its files, as fsspec sees them.
        patch: for the environment of the test.
    """

    server: str
    bucket: str
    files: Any
    patch: pytest.MonkeyPatch

    def url(self, name: str) -> str:
        """Of a folder."""
        return f"s3://{self.bucket}/{name}"

    def upload(self, folder: Path, name: str = "") -> str:
        """Put the files of a folder there; its URL."""
        name = name or folder.name
        for path in folder.iterdir():
            self.files.put_file(str(path), f"{self.bucket}/{name}/{path.name}")
        return self.url(name)

    def download(self, url: str, folder: Path) -> Path:
        """Bring all files of a folder here."""
        for name in self.names(url):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(f"{url}/{name}", str(folder / name))
        return folder

    def names(self, url: str) -> list[str]:
        """Relative paths of all files below a folder."""
        self.files.invalidate_cache()
        start = len(url.removeprefix("s3://")) + 1
        return [path[start:] for path in self.files.find(url)]

    @contextmanager
    def watched(self) -> Iterator[Proxy]:
        """The same storage through a proxy that counts, and fails on command."""
        with proxy(self.server) as (watcher, url):
            self.move_to(url)
            yield watcher
            self.move_to(self.server)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """The server asks who asks, and knows nobody."""
        self._ask_after(0)
        yield
        self._ask_after(1e9)

    def _ask_after(self, requests: float) -> None:
        data, kind = str(requests).encode(), {"Content-Type": "text/plain"}
        url = f"{self.server}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, data, kind)).close()

    def move_to(self, server: str) -> None:
        """Let the storage be looked for at another server from now on."""
        self.patch.setenv(ENDPOINT, server)
        s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server() -> Iterator[tuple[str, Any]]:
    """The server: its URL, and its files."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    who = {"key": USER["AWS_ACCESS_KEY_ID"], "secret": SECRET}
    yield url, s3fs.S3FileSystem(**who, endpoint_url=url, use_listings_cache=False)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def new_bucket(server: str, files: Any, patch: pytest.MonkeyPatch) -> Storage:
    """A bucket on it, which the environment leads to."""
    for name, value in {**USER, ENDPOINT: server}.items():
        patch.setenv(name, value)
    patch.delenv("AWS_PROFILE", raising=False)
    made = Storage(server, f"bucket-{next(_numbers)}", files, patch)
    files.mkdir(made.bucket)
    return made
