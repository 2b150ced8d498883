"""Serve objects as S3 does, from files of a folder, with the latency and bandwidth of a network.

moto's server, which the tests of what is right use, reads a whole object for each range, and so is no measure of speed.
What is here is by the API reference of S3: GET with a range and If-Match, HEAD, PUT, ListObjectsV2, multipart uploads.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

STEP = 1 << 20  # bytes that are sent at a time


@dataclass
class S3Server:
    """A server and its limits.

    Attributes:
        latency: seconds before each answer.
        rate: bytes in a second, of all answers and bodies together; 0 for any.
        requests: kind of request -> how many there were.
    """

    folder: Path
    endpoint: str = ""
    latency: float = 0.0
    rate: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def spend(self, nbytes: int) -> None:
        """Wait as long as the network takes for some bytes."""
        if self.rate:
            with self._lock:
                begin = max(self._next, time.monotonic())
                self._next = begin + nbytes / self.rate
            time.sleep(max(0.0, begin - time.monotonic()))


def _tag(path: Path) -> str:
    status = path.stat()
    return hashlib.md5(f"{status.st_size} {status.st_mtime_ns} {status.st_ino}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_state: S3Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _begin(self) -> tuple[Path, dict[str, str]]:
        time.sleep(self.server_state.latency)
        parsed = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parsed.query, keep_blank_values=True).items()}
        kind = " ".join(key for key in ("uploads", "uploadId", "list-type", "partNumber") if key in query)
        self.server_state.requests[f"{self.command} {kind}".strip()] += 1
        return self.server_state.folder / unquote(parsed.path).strip("/"), query

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length") or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _xml(self, name: str, content: str) -> None:
        self._send(200, f"<?xml version='1.0'?><{name}>{content}</{name}>".encode(), Content_Type="application/xml")

    def _body(self) -> bytearray:
        left, data = int(self.headers.get("Content-Length", 0)), bytearray()
        while len(data) < left:
            part = self.rfile.read(min(STEP, left - len(data)))
            self.server_state.spend(len(part))
            data += part
        return _unchunked(data) if "aws-chunked" in self.headers.get("Content-Encoding", "") else data

    def do_HEAD(self) -> None:
        path, _ = self._begin()
        if not path.is_file():
            return self._send(404)
        self.send_response(200)
        self.send_header("ETag", f'"{_tag(path)}"')
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def do_GET(self) -> None:
        path, query = self._begin()
        if "list-type" in query:
            return self._list(path, query)
        if "uploadId" in query:
            parts = sorted(
                (self.server_state.folder / ".uploads" / query["uploadId"]).iterdir(), key=lambda p: int(p.name)
            )
            rows = "".join(
                f"<Part><PartNumber>{each.name}</PartNumber><ETag>{hashlib.md5(each.read_bytes()).hexdigest()}</ETag>"
                f"<Size>{each.stat().st_size}</Size></Part>"
                for each in parts
            )
            return self._xml("ListPartsResult", f"{rows}<IsTruncated>false</IsTruncated>")
        if not path.is_file():
            return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        tag, nbytes = f'"{_tag(path)}"', path.stat().st_size
        if self.headers.get("If-Match", tag) not in (tag, tag.strip('"')):
            return self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert found
        first, last = int(found[1]), min(nbytes - 1, int(found[2] or nbytes - 1))
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Range", f"bytes {first}-{last}/{nbytes}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while left:
                part = file.read(min(STEP, left))
                self.server_state.spend(len(part))
                self.wfile.write(part)
                left -= len(part)

    def _list(self, bucket: Path, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = sorted(each.relative_to(bucket).as_posix() for each in bucket.rglob("*") if each.is_file())
        contents, folders = "", set[str]()
        for key in (each for each in keys if each.startswith(prefix)):
            rest = key.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            path = bucket / key
            contents += (
                f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size><ETag>&quot;{_tag(path)}&quot;"
                "</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            )
        contents += "".join(
            f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders)
        )
        self._xml("ListBucketResult", f"{contents}<IsTruncated>false</IsTruncated>")

    def do_PUT(self) -> None:
        path, query = self._begin()
        data = self._body()
        if "uploadId" in query:
            path = self.server_state.folder / ".uploads" / query["uploadId"] / query["partNumber"]
        elif path.parent == self.server_state.folder:  # a bucket
            return self._send(409, b"<Error><Code>BucketAlreadyOwnedByYou</Code></Error>")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._send(200, ETag=f'"{hashlib.md5(data).hexdigest()}"' if "uploadId" in query else f'"{_tag(path)}"')

    def do_POST(self) -> None:
        path, query = self._begin()
        body = bytes(self._body())
        if "delete" in query:
            for key in re.findall(rb"<Key>(.*?)</Key>", body):
                (path / key.decode()).unlink(missing_ok=True)
            return self._xml("DeleteResult", "")
        if "uploads" in query:
            identity = hashlib.md5(os.urandom(16)).hexdigest()
            (self.server_state.folder / ".uploads" / identity).mkdir(parents=True)
            return self._xml("InitiateMultipartUploadResult", f"<UploadId>{identity}</UploadId>")
        parts = self.server_state.folder / ".uploads" / query["uploadId"]
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        with new.open("wb") as file:
            for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body):
                file.write((parts / number.decode()).read_bytes())
        new.replace(path)
        self._remove(parts)
        self._xml("CompleteMultipartUploadResult", f"<ETag>&quot;{_tag(path)}&quot;</ETag>")

    def do_DELETE(self) -> None:
        path, query = self._begin()
        if "uploadId" in query:
            self._remove(self.server_state.folder / ".uploads" / query["uploadId"])
        else:
            path.unlink(missing_ok=True)
        self._send(204)

    def _remove(self, folder: Path) -> None:
        for each in folder.iterdir():
            each.unlink()
        folder.rmdir()


def _unchunked(data: bytearray) -> bytearray:
    """Return the content of a body in chunks, each after a line with its size in hexadecimal digits."""
    found, place = bytearray(), 0
    while True:
        end = data.index(b"\r\n", place)
        size = int(bytes(data[place:end]).split(b";")[0], 16)
        if not size:
            return found
        found += data[end + 2 : end + 2 + size]
        place = end + 2 + size + 2


@contextmanager
def serve_s3(folder: Path, latency: float = 0.0, rate: float = 0.0) -> Iterator[S3Server]:
    """Serve a folder, whose folders are the buckets, until the block ends."""
    state = S3Server(folder, latency=latency, rate=rate)
    handler = type("Handler", (_Handler,), {"server_state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":  # in a process of its own, for measurements: folder, latency, rate
    with serve_s3(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])) as served:
        print(served.endpoint, flush=True)
        sys.stdin.read()
