"""Stores on this machine: moto's server of S3, and a web server with ranges and ETags."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's server, and yield its HOST:PORT."""
    module = pytest.importorskip("moto.server")
    server = module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@contextmanager
def s3_at(endpoint: str) -> Iterator[Any]:
    """Have fsspec's S3 ask a server; yields the file system."""
    fsspec, s3fs = pytest.importorskip("fsspec"), pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        patched.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield fsspec.filesystem("s3")
        s3fs.S3FileSystem.clear_instance_cache()


class WebHandler(http.server.SimpleHTTPRequestHandler):
    """Serve a folder with ranges and ETags; the standard library's handler knows neither."""

    protocol_version = "HTTP/1.1"
    ranges = True
    tag = '"{}"'  # of the ETag; empty for none

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()
        data = path.read_bytes()
        tag = self.tag.format(hashlib.sha256(data).hexdigest())
        if self.headers.get("If-Match", tag) != tag:
            self.send_response(412)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        span = self.headers.get("Range") if self.ranges else None
        if span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None


@contextmanager
def served(folder: Path, handler: type[WebHandler] = WebHandler) -> Iterator[str]:
    """Serve a folder as web pages, and yield the link to it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
