"""Open links to stores: each object of a folder stands here as an empty file, whose bytes are read by ranges.

fsspec and its packages, which the extra `remote` installs, list the objects and have credentials and endpoints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ...durable import disk
from ...durable.descriptors import REPLACED, WAIT
from ...durable.elsewhere import forget_stand_ins, stand_in
from ...errors import InputError, LoratoolError, MachineError, install_remedy, show_as
from .links import StoreLink, at_end, place_here
from .table import ANY, STORES, FileExpired, Info, Read, StoreKind

T = TypeVar("T")

DEPTH = 3  # folders under the one that is named: components of a pipeline, states of a training run

PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds before the next attempt

# Classes of botocore, google-auth and azure-core
NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError")
)

AT_ONCE = 8  # questions

# What may be beside a file on a server that lists nothing
BESIDE = ("config.json", "adapter_config.json")

_folder: list[Any] = []  # the temporary folder of this process for what stands in, once there is one

_opened: dict[str, Path] = {}  # link -> where it stands


class StoredObject:
    """An object in a store, as it was when the link was opened."""

    def __init__(self, link: StoreLink, name: str, path: str, info: Info) -> None:
        self.name, self._path, self._link = name, path, link
        self.nbytes = int(info["size"])
        self._store = store_of(link)
        with explained(name, self._store):
            self.identity = self._store.identity(file_system(link), path, info)
        self._readers: dict[int, Read] = {}  # process -> its reader, as no connection outlives a fork

    def fetch(self, first: int, end: int) -> bytes:
        """Return the bytes first:end, of this state of the object.

        Raises:
            InputError: it was replaced or removed, or may not be read.
            MachineError: it was not reached, or the answers have another length.
        """
        return attempted(lambda: self._fetch(first, end), self.name, self._store)

    def _fetch(self, first: int, end: int) -> bytes:
        reader = self._readers.get(os.getpid())
        if reader is None:
            reader = self._store.reader(file_system(self._link), self._path, self.identity)
            self._readers[os.getpid()] = reader
        data = reader(first, end)
        if len(data) != end - first:
            raise ConnectionError(f"sent {len(data)} of {end - first} bytes")
        if not self._store.checks:
            self._compare()
        return data

    def require_same(self) -> None:
        """Raise InputError if the object was replaced or removed since it was opened."""
        attempted(self._compare, self.name, self._store)

    def _compare(self) -> None:
        system = file_system(self._link)
        system.invalidate_cache()
        info = system.info(self._path)
        if int(info["size"]) != self.nbytes or self._store.identity(system, self._path, info) != self.identity:
            raise FileExpired(self._path)


def store_of(link: StoreLink) -> StoreKind:
    return STORES.get(link.scheme, ANY)


def open_store(link: StoreLink) -> Path:
    """Return the path of the folder or file that stands here for a link, until the process ends.

    Raises:
        InputError: there is no such object, or it may not be read.
        MachineError: the store was not reached, or its package is not installed.
    """
    if link.text not in _opened:
        if _forget not in at_end:
            at_end.append(_forget)
        store, text = store_of(link), str(link)
        system, path = _connected(link)
        found = attempted(lambda: _listed(system, link, path), text, store)
        place = place_here(link.scheme, path)
        if not found or place is None:
            raise InputError("the store has no such object, and no folder of this name", culprit=text)
        root = _root()
        disk.make_folder((root / place).parent)
        for name, info in found.items():
            here = place_here(link.scheme, name)
            if here is not None:
                shown = str(StoreLink(link.scheme, name if "://" in name else f"{link.scheme}://{name}"))
                _stand_in(root / here, StoredObject(link, shown, name, info))
        show_as(f"{root / link.scheme}{os.sep}", f"{link.scheme}://")
        _opened[link.text] = root / place
    return _opened[link.text]


def forget_link(link: StoreLink) -> None:
    """Forget the state of the objects under a link, which this process has just written."""
    for text in [each for each in _opened if each == link.text or each.startswith(f"{link.text}/")]:
        del _opened[text]


def _forget() -> None:
    """Forget the state of all links, so that the next command sees what the stores have then."""
    _opened.clear()
    forget_stand_ins()
    for each in _root().iterdir():
        disk.remove_folder(each)


def _stand_in(here: Path, source: StoredObject) -> None:
    disk.make_folder(here.parent)
    disk.open_file(here, "w+b").close()
    stand_in(here, source)


def _root() -> Path:
    if not _folder:
        _folder.append(disk.temporary_folder())
    return Path(_folder[0].name)


def _connected(link: StoreLink) -> tuple[Any, str]:
    """Return the file system of a link, and the path in it."""
    from fsspec.core import url_to_fs

    store = store_of(link)
    try:
        with explained(str(link), store):
            system, path = url_to_fs(link.text, **(store.options or {}))
    except ImportError as error:
        package = store.package or f"fsspec's package for {link.scheme}"
        what = f"to read it, install {package}"
        raise MachineError(what, culprit=str(link), remedy=install_remedy("remote")) from error
    return system, path.rstrip("/") if link.scheme not in ("http", "https") else path


def file_system(link: StoreLink) -> Any:
    """Return the file system of a link in this process; fsspec keeps one for each."""
    return _connected(link)[0]


def _listed(system: Any, link: StoreLink, path: str) -> dict[str, Info]:
    """Return the objects under a path, or that of this path with those beside it, each with its size."""
    is_web = link.scheme in ("http", "https")
    is_file = not path.endswith("/") if is_web else system.info(path)["type"] == "file"
    if not is_file:
        found = system.find(path, maxdepth=DEPTH, detail=True)
        return _with_sizes(system, found) if is_web else found
    parent, beside = path.rpartition("/")[0], dict[str, Info]()
    with suppress(Exception):  # who may read an object may not always list
        listed = system.ls(f"{parent}/" if is_web else parent, detail=True)
        beside = {each["name"]: each for each in listed if each["type"] == "file"}
    if is_web:
        names = {*beside, *(f"{parent}/{name}" for name in BESIDE)} - {path}
        beside = _with_sizes(system, names)
    return {**beside, path: system.info(path)}


def _with_sizes(system: Any, names: Collection[str]) -> dict[str, Info]:
    """Ask a server for the sizes of files; those that it does not have are left out."""

    def info(name: str) -> Info:
        with suppress(FileNotFoundError):
            found: Info = system.info(name)
            return found
        return {}

    from concurrent.futures import ThreadPoolExecutor  # it loads `logging`, which most runs can do without

    with ThreadPoolExecutor(AT_ONCE) as asker:
        found = dict(zip(names, asker.map(info, names), strict=True))
    return {name: each for name, each in found.items() if each.get("size") is not None}


def attempted(action: Callable[[], T], name: str, store: StoreKind) -> T:
    """Return the action's result; failures that may pass are tried again, after growing pauses.

    Raises:
        InputError, MachineError: as `explained`.
    """
    for pause in PAUSES:
        try:
            return action()
        except LoratoolError:
            raise
        except Exception as error:
            if not _may_pass(error):
                break
            time.sleep(pause)
    with explained(name, store):
        return action()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes tells."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        stated = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        values = (stated, *(getattr(each, field, None) for field in ("status", "status_code", "code")))
        if found := next((value for value in values if isinstance(value, int) and 300 <= value < 600), None):
            return found
    return None


def _may_pass(error: BaseException) -> bool:
    """Return whether another attempt may succeed."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | TypeError):
        return False
    return not {type(each).__name__ for each in _chain(error)} & {"FileExpired", *NO_CREDENTIALS}


@contextmanager
def explained(name: str, store: StoreKind) -> Iterator[None]:
    """Convert the errors of a store into ours."""
    try:
        yield
    except (LoratoolError, ImportError):
        raise
    except Exception as error:
        raise _explain(name, store, error) from error


def _explain(name: str, store: StoreKind, error: Exception) -> LoratoolError:
    status, kinds = _status(error), {type(each).__name__ for each in _chain(error)}
    if status == 412 or kinds & {"FileExpired", "ResourceModifiedError"}:
        return InputError(REPLACED, culprit=name, remedy=WAIT)
    if status == 404 or isinstance(error, FileNotFoundError):
        return InputError("the store has no such object", culprit=name)
    if status in (401, 403) or isinstance(error, PermissionError) or kinds & NO_CREDENTIALS:
        return InputError("the store refuses it to these credentials", culprit=name, remedy=store.log_in)
    first = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    again = "check the connection and run the command again"
    return MachineError(f"could not be read from the store: {first}", culprit=name, remedy=again)
