"""Open links to stores: each object of a folder stands here as an empty file, whose bytes are read by ranges.

fsspec and its packages, which the extra `remote` installs, list the objects and have credentials and endpoints.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...durable import disk
from ...durable.descriptors import REPLACED, WAIT
from ...durable.elsewhere import forget_stand_ins, stand_in
from ...durable.fileio import is_beside
from ...errors import InputError, LoratoolError, MachineError, install_remedy, show_as
from .links import StoreLink, at_end, place_here
from .table import ANY, STORES, FileExpired, Info, Read, StoreKind

T = TypeVar("T")

DEPTH = 3  # folders under the one that is named: components of a pipeline, states of a training run

MOST = 20_000  # objects of a folder

PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the next attempt

PATIENCE = 60  # seconds after which no other attempt begins; the stores' packages repeat some requests themselves

# Classes of botocore, google-auth and azure-core
NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError")
)

NO_NAME = "ParamValidationError"  # botocore's, of a bucket's name

NOT_REACHED = frozenset(("ClientConnectionError", "ClientPayloadError", "TimeoutError", "HTTPClientError"))

AT_ONCE = 8  # questions

INDEX, LONGEST_INDEX = ".index.json", 1 << 26  # bytes

# What may be beside a file on a server that lists nothing
BESIDE = ("config.json", "adapter_config.json")

_folder: list[Any] = []  # the temporary folder of this process for what stands in, once there is one

_numbers = itertools.count()

_opened: dict[str, Path] = {}  # link -> where it stands

_failed: dict[str, LoratoolError] = {}  # link -> why it could not be read


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
        if self._link.text in _failed:  # other threads would each wait as long for nothing
            raise _failed[self._link.text]
        try:
            return attempted(lambda: self._fetch(first, end), self.name, self._store, was_there=True)
        except LoratoolError as error:
            _failed[self._link.text] = error
            raise

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
        attempted(self._compare, self.name, self._store, was_there=True)

    def _compare(self) -> None:
        system = file_system(self._link)
        system.invalidate_cache()
        info = system.info(self._path)
        if info["size"] != self.nbytes or self._store.identity(system, self._path, info) != self.identity:
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
        _silence()
        store, text = store_of(link), str(link)
        system, path = _connected(link)
        found = attempted(lambda: _listed(system, link, path), text, store)
        if not found:
            raise InputError("the store has no such object, and no folder of this name", culprit=text)
        _opened[link.text] = _place(link, path, found)
    return _opened[link.text]


def forget_link(link: StoreLink) -> None:
    """Forget the state of the objects under a link, which this process has just written."""
    for text in [each for each in _opened if each == link.text or each.startswith(f"{link.text}/")]:
        del _opened[text]


def _forget() -> None:
    """Forget the state of all links, so that the next command sees what the stores have then."""
    _opened.clear()
    _failed.clear()
    forget_stand_ins()
    for each in _root().iterdir():
        disk.remove_folder(each)


def _place(link: StoreLink, path: str, found: Mapping[str, Info]) -> Path:
    """Put the stand-ins of the objects into a folder of their own, and return the place of the one that was named.

    Two links to the same names, such as those of two versions, can be to other bytes.
    """
    text, above = str(link).rstrip("/"), _without_query(path).rstrip("/").rpartition("/")[0]
    folder = _root() / f"{os.getpid()}-{next(_numbers)}"
    places: dict[Path, tuple[str, Info]] = {}
    for name, info in found.items():
        below = place_here(_without_query(name).removeprefix(above))
        if below is None:
            continue
        if (folder / below) in places and name != path:
            if places[folder / below][0] != path:
                raise InputError(
                    "has two objects with one name here", culprit=f"{text}: {Path(_without_query(name)).name}"
                )
            continue
        places[folder / below] = name, info
    named = place_here(_without_query(path).removeprefix(above))
    parents = {parent for place in places for parent in place.parents}
    if named is None or not {folder / named} & {*places, *parents}:
        raise InputError("is no name that a file can have here", culprit=text)
    show_as(str(folder / named), text)
    show_as(f"{folder}{os.sep}", text.rpartition("/")[0] + "/")
    for place, (name, info) in places.items():
        if place not in parents:  # a store can have an object with the name of a folder
            shown = str(StoreLink(link.scheme, name if "://" in name else f"{link.scheme}://{name.lstrip('/')}"))
            disk.make_folder(place.parent)
            disk.open_file(place, "w+b").close()
            stand_in(place, StoredObject(link, shown, name, info))
    return folder / named


def _without_query(path: str) -> str:
    return path.partition("?")[0]


def _root() -> Path:
    if not _folder:
        _folder.append(disk.temporary_folder())
    return Path(_folder[0].name)


def _silence() -> None:
    """Keep the messages of the stores' packages from the terminal, which Python shows if nobody handles them."""
    import logging  # most runs can do without it

    for name in ("aiobotocore", "asyncio", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs"):
        if not logging.getLogger(name).handlers:
            logging.getLogger(name).addHandler(logging.NullHandler())


def _connected(link: StoreLink) -> tuple[Any, str]:
    """Return the file system of a link, and the path in it."""
    from fsspec.core import url_to_fs

    store = store_of(link)
    try:
        with explained(str(link), store):
            system, path = url_to_fs(link.text, **store.options())
    except ImportError as error:
        package = store.package or f"fsspec's package for {link.scheme}"
        what = f"to read it, install {package}"
        raise MachineError(what, culprit=str(link), remedy=install_remedy("remote")) from error
    if hasattr(system, "retries"):
        system.retries = 1  # s3fs's, of which one is a wait of SILENCE: `attempted` has them
    return system, path.rstrip("/") if link.scheme not in ("http", "https") else path


def file_system(link: StoreLink) -> Any:
    """Return the file system of a link in this process; fsspec keeps one for each."""
    return _connected(link)[0]


def _listed(system: Any, link: StoreLink, path: str) -> dict[str, Info]:
    """Return the objects under a path, or that of this path with those beside it, each with its size."""
    is_web = link.scheme in ("http", "https")
    system.invalidate_cache()
    is_file = not path.endswith("/") if is_web else system.info(path)["type"] == "file"
    if not is_file:
        found = _below(system, path, str(link))
        return _with_sizes(system, found) if is_web else found
    parent = _without_query(path).rpartition("/")[0]
    names = _beside(system, f"{parent}/" if is_web else parent)
    if is_web:
        names = _with_sizes(system, {*names, *(f"{parent}/{name}" for name in _named(system, path))} - {path})
    info = system.info(path)
    if info.get("size") is None:
        raise InputError("the server does not tell its length", culprit=str(link), remedy=DOWNLOAD)
    return {**names, path: info}


def _below(system: Any, path: str, text: str) -> dict[str, Info]:
    """Return the files in a folder and DEPTH - 1 folders below; fsspec's own search leaves out what it cannot list."""
    from concurrent.futures import ThreadPoolExecutor  # it loads `logging`

    found, folders = dict[str, Info](), [path]
    for _ in range(DEPTH):
        with ThreadPoolExecutor(AT_ONCE) as asker:
            lists = [*asker.map(partial(system.ls, detail=True), folders)]
        entries = [entry for entries in lists for entry in entries if "?" not in entry["name"]]
        found |= {entry["name"]: entry for entry in entries if entry["type"] == "file" and entry["name"][-1] != "/"}
        folders = [entry["name"] for entry in entries if entry["type"] == "directory" and entry["name"] not in folders]
        if len(found) + len(folders) > MOST:
            what = f"has more than {MOST} objects and folders"
            raise InputError(what, culprit=text, remedy="name the folder of the model or the adapter")
    return found


def _beside(system: Any, folder: str) -> dict[str, Info]:
    """Return the files of a folder; none if it may not be listed."""
    try:
        listed = system.ls(folder, detail=True)
    except Exception as error:
        if _may_pass(error):
            raise
        return {}
    files = {each["name"]: each for each in listed if each["type"] == "file"}
    return files if len(files) <= MOST else {name: each for name, each in files.items() if name.endswith(".json")}


def _named(system: Any, path: str) -> Iterator[str]:
    """Yield what may be beside a file on a server that lists nothing, and what an index names."""
    yield from BESIDE
    if _without_query(path).endswith(INDEX):
        with suppress(ValueError, AttributeError, KeyError, TypeError):  # what reads it says what is wrong with it
            files = {*json.loads(system.cat_file(path, start=0, end=LONGEST_INDEX))["weight_map"].values()}
            yield from (name for name in files if isinstance(name, str) and is_beside(name))


def _with_sizes(system: Any, names: Collection[str]) -> dict[str, Info]:
    """Ask a server for the sizes of files; those that it does not have or does not give are left out."""

    def info(name: str) -> Info:
        try:
            found: Info = system.info(name)
        except Exception as error:
            if _may_pass(error):
                raise
            return {}
        return found

    from concurrent.futures import ThreadPoolExecutor  # it loads `logging`

    with ThreadPoolExecutor(AT_ONCE) as asker:
        found = dict(zip(names, asker.map(info, names), strict=True))
    return {name: each for name, each in found.items() if each.get("size") is not None}


def attempted(action: Callable[[], T], name: str, store: StoreKind, was_there: bool = False) -> T:
    """Return the action's result; failures that may pass are tried again, after growing pauses.

    Raises:
        InputError, MachineError: as `explained`.
    """
    until = time.monotonic() + PATIENCE
    for pause in PAUSES:
        try:
            return action()
        except LoratoolError:
            raise
        except Exception as error:
            if not _may_pass(error) or time.monotonic() + pause > until:
                with explained(name, store, was_there):
                    raise
            time.sleep(pause)
    with explained(name, store, was_there):
        return action()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kinds(error: BaseException) -> set[str]:
    """Return the names of the classes of an error and its causes."""
    return {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes tells."""
    for each in _chain(error):
        if "HttpProcessingError" in {kind.__name__ for kind in type(each).__mro__}:  # aiohttp's words for a cut answer
            continue
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for field in ("status", "status_code", "code"):
            value = getattr(each, field, None)
            if isinstance(value, int) and 300 <= value < 600:
                return value
    return None


def _is_missing(error: BaseException) -> bool:
    """Return whether an error says that there is no such object; fsspec says so of all that a web server refuses."""
    status = _status(error)
    if status is not None:
        return status in (404, 410)
    return isinstance(error, FileNotFoundError | NotADirectoryError) and not _kinds(error) & NOT_REACHED


def _may_pass(error: BaseException) -> bool:
    """Return whether another attempt may succeed."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if any(isinstance(each, socket.gaierror) and each.errno != socket.EAI_AGAIN for each in _chain(error)):
        return False
    if _is_missing(error) or isinstance(error, PermissionError | ImportError | ValueError | TypeError | LoratoolError):
        return False
    return not _kinds(error) & {"FileExpired", "WholeFilesOnly", "NotImplementedError", NO_NAME, *NO_CREDENTIALS}


@contextmanager
def explained(name: str, store: StoreKind, was_there: bool = False) -> Iterator[None]:
    """Convert the errors of a store into ours."""
    try:
        yield
    except (LoratoolError, ImportError):
        raise
    except Exception as error:
        raise _explain(name, store, error, was_there) from error


DOWNLOAD = "download it, and give the path of the file"


def _explain(name: str, store: StoreKind, error: Exception, was_there: bool) -> LoratoolError:
    status, kinds = _status(error), _kinds(error)
    is_missing = _is_missing(error)
    if status in (412, 416) or kinds & {"FileExpired", "ResourceModifiedError"} or (is_missing and was_there):
        return InputError(REPLACED, culprit=name, remedy=WAIT)
    if is_missing:
        return InputError("the store has no such object", culprit=name)
    is_refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden")  # gcsfs's
    if status in (401, 403) or is_refused or kinds & NO_CREDENTIALS:
        return InputError("the store refuses it to these credentials", culprit=name, remedy=store.log_in)
    if NO_NAME in kinds:
        return InputError("is no name that the store takes", culprit=name)
    if "WholeFilesOnly" in kinds:
        return InputError("the server sends only whole files", culprit=name, remedy=DOWNLOAD)
    first = next(filter(None, map(str.strip, str(_reason(error)).splitlines())), type(error).__name__)
    again = "check the connection and run the command again"
    return MachineError(f"could not be read from the store: {first}", culprit=name, remedy=again)


def _reason(error: Exception) -> BaseException:
    """Return the error that says what failed: fsspec's own of a missing file has only the name."""
    return next((each for each in _chain(error) if not isinstance(each, FileNotFoundError)), error)
