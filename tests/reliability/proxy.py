"""A proxy on loopback before a real server, which fails on command."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

# An answer of the proxy's own; no answer, the request never arriving; or it arrives, and is obeyed,
# and the answer is lost.
Fault = Literal[500, 503, "dropped", "lost"]
FAULTS: tuple[Fault, ...] = (500, 503, "dropped", "lost")
ERROR = "HTTP/1.1 {} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
EXPECT = re.compile(rb"\r\nexpect: *100-continue", re.IGNORECASE)
CHUNK = 65536


@dataclass
class Proxy:
    """What was asked, and what is to fail.

    Attributes:
        upstream: host and port of the real server.
        asked: method and path of every request, in order.
        fault: how those fail that do.
        failing: numbers of the requests that do.
        sent: bytes of all answers.
    """

    upstream: tuple[str, int]
    asked: list[str] = field(default_factory=list)
    fault: Fault = 500
    failing: range = range(0)
    sent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, fault: Fault, start: int, count: int) -> None:
        """Let so many requests fail, from that number on, counted from now."""
        with self._lock:
            self.asked.clear()
            self.fault, self.failing = fault, range(start, start + count)

    def heal(self) -> list[str]:
        """Let none fail any more; what was asked until now."""
        asked = list(self.asked)
        self.fail(500, 0, 0)
        return asked

    def serve(self, client: socket.socket) -> None:
        """One connection, which carries one request, or a WebSocket."""
        with client, suppress(OSError):
            request = _read(client)
            if not request:
                return
            with self._lock:
                number = len(self.asked)
                self.asked.append(request.partition(b" HTTP/")[0].decode())
                fault = self.fault if number in self.failing else None
            if fault == "dropped":
                return
            if isinstance(fault, int):
                client.sendall(ERROR.format(fault).encode())
                return
            with socket.create_connection(self.upstream) as server:
                server.sendall(request)
                if fault == "lost":
                    while server.recv(CHUNK):
                        pass
                    return
                self._relay(server, client)

    def _relay(self, server: socket.socket, client: socket.socket) -> None:
        """Bytes both ways, until the server has said all."""
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        with suppress(OSError):
            while chunk := server.recv(CHUNK):
                with self._lock:
                    self.sent += len(chunk)  # before anybody can ask
                client.sendall(chunk)


@contextmanager
def proxy(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server at `url`, and its own URL, which has no path."""
    parts = urlsplit(url)
    made = Proxy((str(parts.hostname), int(parts.port or 80)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, made), daemon=True).start()
        yield made, f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)  # which ends the thread


def _accept(listener: socket.socket, made: Proxy) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=made.serve, args=(client,), daemon=True).start()


def _read(client: socket.socket) -> bytes:
    """A whole request that asks for the connection to end with its answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := client.recv(CHUNK)):
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    if EXPECT.search(head):  # who sends much asks first
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = EXPECT.sub(b"", head)
    length = LENGTH.search(head)
    missing = int(length[1]) - len(body) if length else 0
    while missing > 0 and (chunk := client.recv(CHUNK)):
        body, missing = body + chunk, missing - len(chunk)
    if b"upgrade: websocket" not in head.lower():
        head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.IGNORECASE)
        head += b"\r\nConnection: close"
    return head + b"\r\n\r\n" + body


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(CHUNK):
            target.sendall(chunk)
