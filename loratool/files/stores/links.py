"""Links to objects in stores and on web servers, and the names under which they stand here."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ...errors import without_credentials

LINK = re.compile(r"([a-z][a-z0-9+-]+):/{1,2}(?=[^/])")  # a Path of a link has one slash

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")

_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\*?"<>|\ud800-\udfff]')  # in a file's name, on some system


at_end: list[Callable[[], None]] = []  # called when no command runs any more

_lock, _running = threading.Lock(), 0  # commands


@contextmanager
def links_in_one_state() -> Iterator[None]:
    """Keep the state of the objects of each link until all commands that run at the same time have ended."""
    global _running
    with _lock:
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            while at_end and not _running:
                at_end.pop()()


class ShownLink(str):
    """A link without its credentials and query, as reports show it; `given` has them, for what opens it."""

    given: str


_FILE = re.compile(r"(file|local):/{1,3}(?=[^/])")


@dataclass(frozen=True)
class StoreLink:
    """A link to an object or a folder of objects; `text` is as fsspec takes it."""

    scheme: str
    text: str

    def __str__(self) -> str:
        return without_credentials(self.text)


def here_of(text: str) -> str | None:
    """Return the path that a link to a file of this machine is to; None for any other text."""
    match = _FILE.match(text)
    return url2pathname(f"/{text[match.end() :]}") if match else None


def without_secrets(link: StoreLink) -> ShownLink:
    shown = ShownLink(str(link))
    shown.given = link.text
    return shown


def parse_store_link(text: str) -> StoreLink | None:
    """Return the link to a store that a text is; None for a path, a name or a link of the hub, an unknown scheme."""
    text = text.given if isinstance(text, ShownLink) else text
    match = LINK.match(text)
    if not match:
        return None
    scheme, location = match[1], text[match.end() :]
    if scheme in ("file", "local"):  # a path, by `here_of`
        return None
    if scheme == "hf" and not location.startswith("buckets/"):
        return None
    if scheme in ("http", "https") and _host(location) in (*HUB_HOSTS, _host(_endpoint())):
        return None
    from fsspec.registry import known_implementations, registry

    is_known = scheme in known_implementations or scheme in registry
    return StoreLink(scheme, f"{scheme}://{location}") if is_known else None


def place_here(path: str) -> PurePosixPath | None:
    """Return the relative path under which an object stands here; None if a part of it is no name of a file.

    Args:
        path: of the object below a folder, which may end with a query.
    """
    parts = [part for part in path.partition("?")[0].split("/") if part]
    if not parts or not all(part.strip(" .") and not _UNSAFE.search(part) for part in parts):
        return None
    return PurePosixPath(*(part.replace(":", "_") for part in parts))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").partition("://")[2]


def _host(location: str) -> str:
    """Return the host of a link without its scheme; empty if it is malformed, such as half an address in brackets."""
    try:
        return urlsplit(f"//{location}").netloc.rpartition("@")[2]
    except ValueError:
        return ""
