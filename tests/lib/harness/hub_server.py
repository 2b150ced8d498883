"""Serve repositories of models as the hub does, on this machine: the endpoints that huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A model's commits, and how the server treats those who ask for it."""

    commits: dict[str, dict[str, bytes]]  # hash -> path -> content
    refs: dict[str, str]  # branch or tag -> hash
    refusal: tuple[int, str] | None = None  # status and X-Error-Code of every answer
    gated: bool = False  # its files are refused, and not its list
    stalled: set[str] = field(default_factory=set)  # files whose answers begin, and go on when the server ends
    cut: set[str] = field(default_factory=set)  # files whose first answer ends in the middle
    shortened: set[str] = field(default_factory=set)  # files whose answers end early each time, as if they were whole
    damaged: set[str] = field(default_factory=set)  # files whose answers have other bytes than the list says
    mistagged: set[str] = field(default_factory=set)  # files whose ETag is of other bytes
    rangeless: set[str] = field(default_factory=set)  # files that are sent whole, whatever part is asked for
    other_ranges: set[str] = field(default_factory=set)  # files of which a part ends a byte too early
    untagged: set[str] = field(default_factory=set)  # files whose answers have no ETag
    private: bool = False


@dataclass
class HubServer:
    endpoint: str
    repositories: dict[str, Repository]
    log: list[tuple[str, str, str]]  # method, path and Range of each request
    stopped: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, bytes] = field(default_factory=dict)  # what was uploaded as LFS, by sha256
    full: bool = False  # takes no commit

    def add(self, name: str, files: Mapping[str, bytes], **more: Any) -> str:
        """Add a repository, or to one a commit on its main branch; return the commit's hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        own = self.repositories.setdefault(name, Repository({}, {}, **more))
        own.commits[commit] = dict(files)
        own.refs["main"] = commit
        return commit

    def fetched(self) -> set[str]:
        """Return the files whose content was sent, without their repositories."""
        found = [re.fullmatch(r"/.*?/resolve/[^/]+/(.+)", path) for method, path, _ in self.log if method == "GET"]
        return {each[1] for each in found if each}


def files_in(folder: Path) -> dict[str, bytes]:
    """Return what is in a folder, as a repository's files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement of its headers

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self.hub.sent[self.path.rpartition("/")[2]] = self._body()
        self._send(200, b"", {})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.log.append((self.command, path, ""))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.repositories[name] = Repository(
                {}, {}, private=asked.get("private") or asked.get("visibility") == "private"
            )
            return self._json({"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = [(each["path"], b"\0" in base64.b64decode(each["sample"])) for each in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
                for name, is_lfs in files
            ]
            return self._json({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self._commit(self.hub.repositories[found[1]], found[1], found[2], body)
        self._send(404, b"", {})

    def _commit(self, own: Repository, name: str, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        former, parent = own.refs.get(branch), lines[0]["value"].get("parentCommit")
        if self.hub.full:
            return self._send(507, b"", {})
        if parent is not None and parent != former:
            return self._send(412, b"", {})
        files = dict(own.commits.get(former or "", {}))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.sent[value["oid"]]
            else:
                del files[value["path"]]
        commit = self.hub.add(name, files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.log.append((self.command, unquote(path), self.headers.get("Range", "")))
        api = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree|commits)/([^/]+))?", path)
        page = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        name, what, revision = api.groups() if api else (page[1], "resolve", page[2]) if page else ("", "", "")
        own = self.hub.repositories.get(name)
        if own is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if own.refusal:
            return self._send(own.refusal[0], b"", {"X-Error-Code": own.refusal[1]})
        asked = unquote(revision or "main")
        commit = own.refs.get(asked, asked)
        if commit not in own.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "commits":
            return self._json(
                [{"id": each, "title": "", "message": "", "date": _DATE, "authors": []} for each in own.commits]
            )
        if what == "tree":
            return self._json([{"path": path, **_listed(data)} for path, data in own.commits[commit].items()])
        if what == "resolve" and page:
            return self._file(own, commit, unquote(page[3]))
        files = [{"rfilename": path, **_listed(data)} for path, data in own.commits[commit].items()]
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": files, "private": False, "tags": []})

    def _file(self, own: Repository, commit: str, path: str) -> None:
        data = own.commits[commit].get(path)
        if own.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        tagged = b"" if path in own.mistagged else data
        headers |= {} if path in own.untagged else {"ETag": f'"{hashlib.sha256(tagged).hexdigest()}"'}
        data = bytes(len(data)) if path in own.damaged else data
        if self.command == "GET" and path in own.shortened:
            return self._send(200, data[: len(data) // 2], headers)
        if (found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and path not in own.rangeless:
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            last -= path in own.other_ranges
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], headers)
        if self.command == "GET" and path in own.stalled:
            self._send(200, data, headers, sent=len(data) // 2)
            self.wfile.flush()
            self.hub.stopped.wait()
            return
        if self.command == "GET" and path in own.cut:
            own.cut.remove(path)
            return self._send(200, data, headers, sent=len(data) // 2)
        self._send(200, data, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if sent is None else data[:sent])
        self.close_connection = self.close_connection or sent is not None


_DATE = "2026-01-01T00:00:00.000Z"


def _listed(data: bytes) -> dict[str, Any]:
    sha256, sha1 = hashlib.sha256(data).hexdigest(), hashlib.sha1(data).hexdigest()
    lfs = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}
    return {"type": "file", "size": len(data), "oid": sha1, "blobId": sha1, **({"lfs": lfs} if b"\0" in data else {})}


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Serve an empty hub on a port of this machine until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = hub = HubServer(f"http://127.0.0.1:{server.server_port}", {}, [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
