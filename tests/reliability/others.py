"""What others may fill: a list in DVC's cache, and an artifact server of MLflow."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from dvc.repo import Repo

from tasks.dvc_store.reference import Reference


def manifest(name: str, md5: str) -> Reference:
    """A list of files in DVC's cache, under its own hash, as somebody with access may put it."""
    text = json.dumps([{"md5": md5, "relpath": name}])
    oid = hashlib.md5(text.encode()).hexdigest()
    with Repo() as repo:
        path = Path(repo.cache.local.oid_to_path(f"{oid}.dir"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Reference("a", f"{oid}.dir")


class Listing(BaseHTTPRequestHandler):
    """An artifact server that lists one file, wherever it should land."""

    name = ""

    def do_GET(self) -> None:
        asks = self.path.partition("?")[0].endswith("artifacts")
        files = [{"path": self.name, "is_dir": False, "file_size": 4}]
        body = json.dumps({"files": files}).encode() if asks else b"evil"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def artifacts(name: str) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Named", (Listing,), {"name": name}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/1"
    finally:
        server.shutdown()
        server.server_close()
