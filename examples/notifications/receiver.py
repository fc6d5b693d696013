"""Hears how runs end, and which version was registered or promoted: one line each.

    RECEIVER_SECRET=... python examples/notifications/receiver.py --port 8800

Prefect signs nothing and posts to /prefect/SECRET;
MLflow posts to /mlflow and signs with the secret.
"""

import argparse
import base64
import hashlib
import hmac
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OLDEST = 300  # seconds: what was signed longer ago may be a recording, played again
LARGEST = 1 << 20  # bytes of a notice

logger = logging.getLogger("receiver")


def is_genuine(secret: str, headers: Message, body: bytes, now: float) -> bool:
    """True if MLflow signed this, with this secret and not long before `now` (s since 1970)."""
    moment = headers.get("X-MLflow-Timestamp", "")
    if not moment.isdecimal() or abs(now - int(moment)) > OLDEST:
        return False
    signed = f"{headers.get('X-MLflow-Delivery-Id')}.{moment}.".encode() + body
    right = base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()
    return hmac.compare_digest(headers.get("X-MLflow-Signature", ""), f"v1,{right}")


def describe(notice: Mapping[str, Any]) -> str:
    """One line on what Prefect or MLflow said."""
    if "text" in notice:
        return f"{notice['text']} {notice['url']}"
    data = notice["data"]
    which = f"{data['name']} version {data['version']}"
    match notice["entity"], notice["action"]:
        case "model_version", "created":
            return f"{which} is registered"
        case "model_version_alias", "created":
            return f"{which} is now {data['alias']}"
    return f"{which}: {notice['entity']} {notice['action']}"


class Receiver(BaseHTTPRequestHandler):
    """Answers 204 to a notice that is genuine, 403 to any other."""

    server: "Server"

    def do_POST(self) -> None:
        """Check a notice, and log it."""
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), LARGEST))
        if self._is_genuine(body):
            logger.info(describe(json.loads(body)))
            self.send_response(HTTPStatus.NO_CONTENT)
        else:
            logger.warning("refused a notice from %s", self.client_address[0])
            self.send_response(HTTPStatus.FORBIDDEN)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: the usual line would show the secret path."""

    def _is_genuine(self, body: bytes) -> bool:
        secret = self.server.secret
        if self.path == "/mlflow":
            return is_genuine(secret, self.headers, body, time.time())
        return hmac.compare_digest(self.path.encode(), f"/prefect/{secret}".encode())


class Server(ThreadingHTTPServer):
    """A server of receivers that know the secret."""

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        super().__init__(address, Receiver)
        self.secret = secret


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8800)
    given = parser.parse_args()
    secret = os.environ.get("RECEIVER_SECRET", "")
    if not secret:
        parser.error("set RECEIVER_SECRET, to what the senders have too")
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    with Server((given.host, given.port), secret) as server:
        logger.info("listening on http://%s:%d", *server.server_address)
        server.serve_forever()


if __name__ == "__main__":
    main()
