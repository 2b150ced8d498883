"""Stand between a client and a store on this machine: log what is asked, take time over it, and break some answers."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 1 << 16  # bytes that are sent at once, and whose time is taken


@dataclass
class Request:
    """What a client asked for, and what it got."""

    method: str
    path: str
    span: str  # the header Range
    fault: str = ""
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass
class Proxy:
    """A proxy before one server.

    Attributes:
        fault: the fault of a request's answer; empty for none. A number is the status of an empty answer; `drop` ends
            the connection without one, `hang` leaves it open; `reset` and `end` do so in the middle of the body, one
            by a reset; `short` and `long` send another length, as if it were right; `tag` sends another ETag.
        latency: seconds before each answer.
        rate: bytes a second, of all answers together; 0 for as many as there are.
    """

    endpoint: str
    server: str  # HOST:PORT
    fault: Callable[[Request], str] = lambda request: ""
    latency: float = 0.0
    rate: float = 0.0
    log: list[Request] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: float = 0.0  # when the line is free again

    def wait_for(self, nbytes: int) -> None:
        """Wait as long as so many bytes are on the line."""
        if self.rate:
            with self._lock:
                self._free = max(time.monotonic(), self._free) + nbytes / self.rate
                until = self._free
            time.sleep(max(0.0, until - time.monotonic()))

    def gets(self) -> list[Request]:
        return [each for each in self.log if each.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request.fault = self.proxy.fault(request)
        self.proxy.log.append(request)
        time.sleep(self.proxy.latency)
        if request.fault.isdigit():
            return self._send(request, int(request.fault), [("Content-Length", "0")], b"")
        if request.fault in ("drop", "hang"):
            if request.fault == "hang":
                self.proxy.stopped.wait()
            self.close_connection = True
            return None
        line = HTTPConnection(self.proxy.server)
        line.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for key, value in self.headers.items():
            if key.lower() != "connection":
                line.putheader(key, value)
        line.putheader("Connection", "close")
        line.endheaders(body)
        answer = line.getresponse()
        data = answer.read()
        line.close()
        if request.fault in ("short", "long") and self.command == "GET":
            data = data[: len(data) // 2] if request.fault == "short" else data + b"\0" * 9
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        headers = [
            (key, '"another"' if key.lower() == "etag" and request.fault == "tag" else value)
            for key, value in answer.getheaders()
            if key.lower() not in ("content-length", "connection", "transfer-encoding")
        ]
        self._send(request, answer.status, [*headers, ("Content-Length", length or "0")], data)

    def _send(self, request: Request, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        request.status, end = status, len(data)
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        if request.fault in ("reset", "end") and data:
            end, self.close_connection = len(data) // 2, True
        for begin in range(0, end, PIECE):
            self.proxy.wait_for(len(data[begin : min(end, begin + PIECE)]))
            self.wfile.write(data[begin : min(end, begin + PIECE)])
        request.sent = end
        if request.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of the proxy."""


@contextmanager
def faulty(server: str, **more: float) -> Iterator[Proxy]:
    """Stand before a server (HOST:PORT) until the block ends."""
    handler = type("Handler", (_Handler,), {})
    own = _Server(("127.0.0.1", 0), handler)
    handler.proxy = proxy = Proxy(f"http://127.0.0.1:{own.server_port}", server, **more)  # type: ignore[attr-defined]
    thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        own.shutdown()
        own.server_close()
        thread.join()
