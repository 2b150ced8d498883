"""Serve objects as Google's JSON API does, with generations, ranges and resumable uploads.

By the reference of the API (https://cloud.google.com/storage/docs/json_api/v1/objects); only what gcsfs asks for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class GcsServer:
    """Buckets without old versions, as those are by default: a replaced object's former generation is missing."""

    endpoint: str
    objects: dict[tuple[str, str], tuple[bytes, int]]  # bucket, name -> content, generation
    uploads: dict[str, bytearray] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # path, Range

    def put(self, bucket: str, name: str, data: bytes) -> None:
        former = self.objects.get((bucket, name), (b"", 1_000))
        self.objects[bucket, name] = data, former[1] + 1

    def put_folder(self, bucket: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, path.relative_to(folder).as_posix(), path.read_bytes())


class _Handler(BaseHTTPRequestHandler):
    store: GcsServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        self.store.log.append((unquote(parts.path), self.headers.get("Range", "")))
        path = parts.path.removeprefix("/download").removeprefix("/storage/v1").strip("/").split("/")
        if len(path) == 4 and path[::2] == ["b", "o"]:
            return self._object(path[1], unquote(path[3]), query)
        if len(path) == 3 and path[0] == "b":
            return self._list(path[1], query)
        if len(path) == 2 and any(bucket == path[1] for bucket, _ in self.store.objects):
            return self._json({"kind": "storage#bucket", "name": path[1], "location": "EU", "storageClass": "STANDARD"})
        self._refuse(404)

    def do_POST(self) -> None:
        parts, query = urlsplit(self.path), {key: each[0] for key, each in parse_qs(urlsplit(self.path).query).items()}
        bucket = unquote(parts.path.split("/")[5])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if query.get("uploadType") == "multipart":
            described, data = body.split(b"--==0==")[1:3]
            name = json.loads(described.split(b"\n\n", 1)[1])["name"]
            self.store.put(bucket, name, data.split(b"\n\n", 1)[1][:-1])
            return self._json(self._described(bucket, name))
        if "upload" not in query:
            identity = str(len(self.store.uploads))
            self.store.uploads[identity] = bytearray()
            link = f"{self.store.endpoint}{parts.path}?name={query['name']}&upload={identity}"
            return self._send(200, b"", {"Location": link})
        span, _, whole = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        sent = self.store.uploads[query["upload"]]
        if span != "*":
            assert int(span.split("-")[0]) == len(sent), "a part is in order"
            sent += body
        if whole == "*" or len(sent) < int(whole):
            return self._send(308, b"", {"Range": f"bytes=0-{len(sent) - 1}"})
        self.store.put(bucket, query["name"], bytes(sent))
        self._json(self._described(bucket, query["name"]))

    def do_DELETE(self) -> None:
        path = urlsplit(self.path).path.removeprefix("/storage/v1").strip("/").split("/")
        gone = self.store.objects.pop((path[1], unquote(path[3])), None) if len(path) == 4 else None
        self._send(204 if gone else 404, b"", {})

    def _object(self, bucket: str, name: str, query: dict[str, list[str]]) -> None:
        data, generation = self.store.objects.get((bucket, name), (b"", 0))
        asked = query.get("generation", [str(generation)])[0]
        if not generation or asked != str(generation):
            return self._refuse(404)
        if query.get("alt", ["json"])[0] != "media":
            return self._json(self._described(bucket, name))
        headers = {"X-Goog-Generation": str(generation), "ETag": f'"{generation}"'}
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1) + 1
            if int(first) >= len(data):
                return self._refuse(416)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            return self._send(206, data[int(first) : end], headers)
        self._send(200, data, headers)

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        items, prefixes = list[dict[str, Any]](), set[str]()
        for owner, name in sorted(self.store.objects):
            if owner == bucket and name.startswith(prefix):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                else:
                    items.append(self._described(bucket, name))
        if not any(owner == bucket for owner, _ in self.store.objects):
            return self._refuse(404)
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _described(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self.store.objects[bucket, name]
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def _refuse(self, status: int) -> None:
        error = {"error": {"code": status, "message": "No such object" if status == 404 else "refused"}}
        self._send(status, json.dumps(error).encode(), {"Content-Type": "application/json"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve_gcs() -> Iterator[GcsServer]:
    """Serve an empty store until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.store = store = GcsServer(f"http://127.0.0.1:{server.server_port}", {})  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
