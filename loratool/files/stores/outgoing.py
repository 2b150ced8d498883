"""Send an output to a store while it is written: here are only the parts that are under way.

The output is built in a folder of the user's cache. A part of 64 MiB is sent as soon as all its bytes are written, and
its place on the disk is released once nothing will read it again. So a run needs some parts of space, whatever the size
of the model. Objects appear when the whole output is right; those that name others, and a list of all, come last.

Each rank of a job has its own folder, and sends whole files. Rank 0 begins the uploads, so that a run that resumes
knows them, whichever rank sends which file then. What ranks know of their files passes as objects beside the output.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...durable import disk, elsewhere
from ...durable.fileio import file_length, open_for_reading, write_file
from ...durable.partial import journal_path, partial_path, what_stays
from ...errors import InputError, MachineError, NeedsFlag, UsageError
from ..containers.zip_entries import FileRange
from .links import StoreLink, at_end
from .objects import attempted, file_system, store_of
from .uploads import PART, Upload

if TYPE_CHECKING:
    from concurrent.futures import Future

PARTS_AT_ONCE = 2  # being sent

STEP = 1 << 20  # bytes that are read at a time

PARTS_WAITING = 2  # written and not sent, of all files: writers wait beyond these

CONTAINER_ENDS = (".safetensors", ".gguf", ".bin", ".pt", ".patch")  # of single files, beside which an undo file is

SPACE = 8 * PART  # bytes on the disk, about, that parts take while they are under way

MARKER = "loratool.complete.json"  # the last object of an output: the names and sizes of the others

FIRST, LAST = (".safetensors", ".gguf", ".undo"), (".index.json", "config.json")  # ends of names; LAST name others


def _by_turn(built: tuple[str, Path]) -> tuple[int, str]:
    """Sort the objects by when they appear: weights first, by which a part of an output is known as one."""
    name, _ = built
    return (0 if name.endswith(FIRST) else 2 if name.endswith(LAST) else 1), name


class Outgoing:
    """An output that goes to a store.

    Args:
        link: of a folder of objects, or of one object.
        folder: where the output is built; it is this run's alone.
    """

    def __init__(self, link: StoreLink, folder: Path) -> None:
        self.link, self.folder = link, folder
        self.path = folder / Path(link.text).name
        self._store = store_of(link)
        from concurrent.futures import ThreadPoolExecutor  # it loads `logging`, which most runs can do without

        self._pool = ThreadPoolExecutor(PARTS_AT_ONCE, "outgoing")
        self._in_order = ThreadPoolExecutor(1, "outgoing in order")
        self._files: dict[str, OutgoingFile] = {}  # by object
        self._identities, self._finishing = self._read_state()  # of uploads, by object
        self._reserved: Mapping[str, str] = {}  # the same, of those that rank 0 has begun for this one
        self._by_others = set[str]()  # objects that other ranks send
        _outgoing[os.path.abspath(self.path)] = self
        at_end.append(self._end)

    def _end(self) -> None:
        _outgoing.pop(os.path.abspath(self.path), None)
        elsewhere.forget_stand_ins()

    def _upload(self, path: str, identity: str) -> Upload:
        begin = self._store.upload
        assert begin, "nothing is sent to other stores"
        upload: Upload = self._attempt(partial(begin, self.system, path, identity))
        return upload

    @property
    def system(self) -> Any:
        return file_system(self.link)

    def object_of(self, name: str) -> str:
        """Return the path in the file system of the object for a file of the output, named relative to its folder."""
        root: str = self.system._strip_protocol(self.link.text).rstrip("/")
        return f"{root.rpartition('/')[0]}/{name}"

    def existing(self, force: bool) -> list[str]:
        """Return the objects that the output replaces.

        Raises:
            NeedsFlag: there are some, and `force` is False.
        """
        root = self.object_of(self.path.name)
        system = self.system
        system.invalidate_cache()

        def find() -> list[str]:
            with suppress(FileNotFoundError):
                if self.path.suffix not in CONTAINER_ENDS:
                    return [name for name in system.find(root) if name == root or name.startswith(f"{root}/")]
                beside = system.ls(root.rpartition("/")[0], detail=True)
                names = [each["name"] for each in beside if each["type"] == "file"]
                return [name for name in names if name == root or name.startswith(f"{root.rpartition('.')[0]}.undo")]
            return []

        found = attempted(find, str(self.link), self._store)
        if found and not force:
            raise NeedsFlag(
                "exists already", culprit=str(self.link), flags="--force", why="to replace it, or name another with -o"
            )
        return found

    def require_apart(self) -> None:
        """Raise UsageError if an input is an object that the output would replace."""
        mine = str(self.link).partition("://")[2]
        for name in elsewhere.opened:
            scheme, _, place = name.partition("://")  # s3a:// is s3:// too
            is_same = scheme == self.link.scheme or scheme in self._store.schemes
            if is_same and (place == mine or place.startswith(f"{mine}/")):
                remedy = "name another output with -o"
                raise UsageError("the output would overwrite an input", culprit=str(self.link), remedy=remedy)

    def begin(
        self,
        place: Path,
        file: BinaryIO,
        nbytes: int,
        extents: Iterable[tuple[int, int]],
        is_read: Callable[[int, int], bool] | None,
    ) -> OutgoingFile:
        """Begin to send a file that is being written.

        Args:
            place: of the file when the output is complete.
            extents: the bytes, as (first, end), that are still to be written.
            is_read: whether bytes of the file, as (first, end), will be read again; None if none will.
        """
        self.require_apart()
        path = self._object_at(place)
        upload, known = self._continued(path)
        return self._add(OutgoingFile(self, path, place, upload, file, nbytes, extents, known, is_read))

    def reserve(self, places: Iterable[Path]) -> dict[str, str]:
        """Begin the uploads of files that other ranks may send, and return their identities, by object."""
        self.require_apart()
        if not self._store.upload or self._store.upload.in_order:
            return {}
        for path in map(self._object_at, places):
            self._identities[path] = self._continued(path)[0].identity
        self._write_state()
        return dict(self._identities)

    def join(self, identities: Mapping[str, str]) -> None:
        """Continue uploads that rank 0 has begun."""
        self._reserved = identities

    def leave(self, place: Path, nbytes: int) -> None:
        """Note a file that another rank sends; what is here of it is empty."""
        self._by_others.add(self._object_at(place))
        elsewhere.stand_in(place, _Sent(f"what is here of {self.link}", nbytes))

    def _continued(self, path: str) -> tuple[Upload, Mapping[int, str]]:
        """Return an upload of an object, and what the store has of it: of the one that was begun, if there is one."""
        if identity := self._reserved.get(path) or self._identities.get(path):
            upload = self._upload(path, identity)
            known = self._unless_missing(upload.sent)
            if known is not None:  # else it was completed, or aborted
                return upload, known
        return self._upload(path, ""), {}

    def _object_at(self, place: Path) -> str:
        return self.object_of(place.relative_to(self.folder).as_posix())

    def _add(self, file: OutgoingFile) -> OutgoingFile:
        self._files[file.path] = file
        self._identities[file.path] = file.upload.identity
        self._write_state()
        return file

    def submit(self, file: OutgoingFile, number: int) -> Future[None]:
        if file.upload.in_order:  # what was written twice would be twice in the object
            return self._in_order.submit(file.send, number)
        return self._pool.submit(attempted, lambda: file.send(number), str(self.link), self._store)

    def keep_few(self) -> None:
        """Release what is sent, and wait while too much is not."""
        from concurrent.futures import wait

        while True:
            for file in self._files.values():
                file.release()
            waiting = [each for file in self._files.values() for each in file.sending.values() if not each.done()]
            if len(waiting) <= PARTS_WAITING:
                return
            wait(waiting, return_when="FIRST_COMPLETED")

    def finish(self, replaced: Collection[str], digest: str | None, others: Callable[[], object]) -> None:
        """Send what is not sent yet, let all objects appear, remove those that are replaced, and write the marker.

        Args:
            others: lets those of other ranks appear.
        """
        self.require_apart()
        built = {self._object_at(place): place for place in self._built()}
        sizes = {path: place.stat().st_size for path, place in sorted(built.items(), key=_by_turn)}
        for path, nbytes in sizes.items():
            if nbytes >= PART and path not in self._files and path not in self._by_others:
                self._send_whole(path, built[path])
        self._finishing = True
        self._write_state()
        marker = self.object_of(f"{self.path.name}/{MARKER}")
        if marker in replaced:
            self._attempt(partial(self.system.rm_file, marker))
        others()
        for path in sizes:
            if path in self._by_others:
                continue
            if file := self._files.get(path):
                self._attempt(partial(file.upload.complete, file.count))
            else:
                self._attempt(partial(self.system.pipe_file, path, built[path].read_bytes()))
        for path in {*replaced} - {*sizes, marker}:
            self._attempt(partial(self.system.rm_file, path))
        if self.path.is_dir():
            root = self.object_of(self.path.name)
            objects = {path.removeprefix(f"{root}/"): nbytes for path, nbytes in sorted(sizes.items())}
            content = json.dumps({"digest": digest, "objects": objects}, indent=1).encode()
            self._attempt(partial(self.system.pipe_file, marker, content))
        self._close()

    def finish_part(self, rank0: Callable[[], object]) -> None:
        """Complete this rank's uploads once rank 0 has all of the output.

        Args:
            rank0: waits until then.
        """
        self._finishing = True
        rank0()
        for file in self._files.values():
            self._attempt(partial(file.upload.complete, file.count))
        self._close()

    def put_records(self, name: str, place: Path) -> None:
        """Put a file of this rank where the others find it under a name and the number of the rank."""
        path = self._records(name, place.name)
        if place.stat().st_size < PART:
            self._attempt(partial(self.system.pipe_file, path, place.read_bytes()))
            return
        file = self._send_whole(path, place)
        self._attempt(partial(file.upload.complete, file.count))
        del self._files[path], self._identities[path]

    def fetch_records(self, name: str, rank: int, place: Path) -> None:
        """Copy here what another rank has put under a name."""
        self.system.invalidate_cache()
        self._attempt(partial(self.system.get_file, self._records(name, str(rank)), str(place)))

    def _records(self, *names: str) -> str:
        return "/".join((self._object_at(journal_path(self.path)), *names))

    def remove_records(self) -> None:
        """Remove what ranks have put for each other, also those of a run that died."""
        self.system.invalidate_cache()
        self._unless_missing(partial(self.system.rm, self._records(), recursive=True))

    def _close(self) -> None:
        for pool in (self._pool, self._in_order):
            pool.shutdown(cancel_futures=True)

    def _built(self) -> Iterator[Path]:
        """Yield the files of the complete output."""
        for place in self.folder.iterdir():
            if place == self._state:
                continue
            yield from (each for each in place.rglob("*") if each.is_file()) if place.is_dir() else (place,)

    def _send_whole(self, path: str, place: Path) -> OutgoingFile:
        with open_for_reading(place) as opened:
            upload, known = self._continued(path)
            file = self._add(OutgoingFile(self, path, place, upload, opened, file_length(opened), known=known))
            file.settle()
        return file

    def _attempt(self, action: Callable[[], Any]) -> Any:
        return attempted(action, str(self.link), self._store)

    def _unless_missing(self, action: Callable[[], Any]) -> Any:
        """Return an action's result; None if the store does not have what it needs."""

        def tried() -> Any:
            with suppress(FileNotFoundError):
                return action()
            return None

        return self._attempt(tried)

    def clear(self, resume: bool) -> None:
        """Remove what earlier runs have left here and in the store, except for what this one resumes."""
        if not resume:
            self._abort_known()
            self._identities, self._finishing = {}, False
        stay = {self._state, partial_path(self.path), journal_path(self.path)} if resume else set()
        for place in {*self.folder.iterdir()} - stay:
            disk.remove_folder(place) if place.is_dir() else disk.unlink(place)

    def abort(self) -> None:
        """Remove from the store what was sent."""
        self._close()
        for file in self._files.values():
            with suppress(Exception):  # the store removes it in time, and the first error is the one to report
                file.upload.abort()
        self._abort_known(self._files)

    def _abort_known(self, done: Collection[str] = ()) -> None:
        for path, identity in self._identities.items():
            if identity and path not in done:
                with suppress(Exception):  # as in `abort`
                    self._upload(path, identity).abort()

    def stays(self) -> str:
        """Name, for a message, what a run can resume; empty if nothing."""
        return what_stays(self.path) or (str(self.link) if self._finishing else "")

    @property
    def _state(self) -> Path:
        return self.folder / "uploads.json"

    @property
    def was_finishing(self) -> bool:
        """Return whether a run that died had begun to let objects appear."""
        return self._finishing

    def _read_state(self) -> tuple[dict[str, str], bool]:
        """Return the identities of the uploads of a run that died, by object, and whether these had begun to appear."""
        with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            state = json.loads(self._state.read_bytes())
            uploads = {path: identity for path, identity in state["uploads"].items() if isinstance(identity, str)}
            return uploads, state["finishing"] is True
        return {}, False

    def _write_state(self) -> None:
        known = {path: identity for path, identity in self._identities.items() if identity}
        write_file(self._state, json.dumps({"uploads": known, "finishing": self._finishing}).encode())


@dataclass(eq=False)
class OutgoingFile:
    """A file that is sent in parts while it is written.

    Attributes:
        path: of its object in the file system.
        place: where it is when the output is complete.
        extents: the bytes, as (first, end), that are still to be written.
        known: number of a part that the store has from a run that died -> its MD5.
        is_read: whether bytes, as (first, end), will be read again; None if none will.
        sending: the parts that are being sent, or were.
    """

    outgoing: Outgoing
    path: str
    place: Path
    upload: Upload
    file: BinaryIO
    nbytes: int
    extents: InitVar[Iterable[tuple[int, int]]] = ()
    known: Mapping[int, str] = field(default_factory=dict)
    is_read: Callable[[int, int], bool] | None = None
    sending: dict[int, Future[None]] = field(init=False, default_factory=dict)

    def __post_init__(self, extents: Iterable[tuple[int, int]]) -> None:
        self._missing = sorted((first, end) for first, end in extents if first < end)  # bytes not written, apart
        self._kept: set[int] = set()  # parts that are sent and still on the disk

    @property
    def count(self) -> int:
        """Return the number of its parts."""
        return max(1, -(-self.nbytes // PART))

    def wrote(self, first: int, end: int) -> None:
        """Note that bytes are written; wait if many parts wait to be sent."""
        if first >= end:
            return
        self._subtract(first, end)
        for number in range(first // PART, -(-end // PART)):
            self._send_if_complete(number)
        if self.upload.in_order:
            while self._next < self.count and self._send_if_complete(self._next):
                pass
        self.outgoing.keep_few()

    @property
    def _next(self) -> int:
        return len(self.sending)

    def _send_if_complete(self, number: int) -> bool:
        """Submit a part if it is written and not submitted; return whether it was."""
        if number in self.sending or not self._is_written(number) or (self.upload.in_order and number != self._next):
            return False
        self.sending[number] = self.outgoing.submit(self, number)
        self._kept.add(number)
        return True

    def _subtract(self, first: int, end: int) -> None:
        start = stop = self._first_after(first)
        rest: list[tuple[int, int]] = []
        while stop < len(self._missing) and self._missing[stop][0] < end:
            begin, last = self._missing[stop]
            rest += [each for each in ((begin, first), (end, last)) if each[0] < each[1]]
            stop += 1
        self._missing[start:stop] = rest

    def _is_written(self, number: int) -> bool:
        at = self._first_after(number * PART)
        return at == len(self._missing) or self._missing[at][0] >= (number + 1) * PART

    def _first_after(self, offset: int) -> int:
        """Return the number of the first missing extent that ends after an offset."""
        return bisect_right(self._missing, offset, key=lambda extent: extent[1])

    def send(self, number: int) -> None:
        """Send a part, unless the store has it from a run that died."""
        part = partial(FileRange, self.file, number * PART, min(PART, self.nbytes - number * PART))
        if number not in self.known or _md5(part()) != self.known[number]:
            self.upload.send(number, io.BufferedReader(part(), STEP))

    def release(self) -> None:
        """Release the parts that are sent and will not be read again; raise the error of one that could not be sent."""
        for number in [each for each in self._kept if self.sending[each].done()]:
            self.sending[number].result()
            first, end = number * PART, min((number + 1) * PART, self.nbytes)
            if self.is_read is None or not self.is_read(first, end):
                elsewhere.stand_in(self.place, _Sent(f"what is here of {self.outgoing.link}", self.nbytes))
                disk.release(self.file, first, end - first)
                self._kept.discard(number)

    def settle(self) -> None:
        """Send the rest, and wait until all is sent; the file may be closed then."""
        for number in range(self.count):
            self._send_if_complete(number)
        for each in self.sending.values():
            each.result()
        if len(self.sending) < self.count:
            raise MachineError("was not written as a whole", culprit=str(self.outgoing.link))


def _md5(stream: io.RawIOBase) -> str:
    digest, buffer = hashlib.md5(usedforsecurity=False), memoryview(bytearray(STEP))
    while nbytes := stream.readinto(buffer):
        digest.update(buffer[:nbytes])
    return digest.hexdigest()


class _Sent:
    """The bytes of a file that is sent in part, and no longer here as a whole."""

    identity = ""

    def __init__(self, name: str, nbytes: int) -> None:
        self.name, self.nbytes = name, nbytes

    def fetch(self, first: int, end: int) -> bytes:
        raise InputError("is sent to the store in part, and cannot be read", culprit=self.name)

    def require_same(self) -> None: ...


_outgoing: dict[str, Outgoing] = {}  # by the path where it is built


def outgoing_of(path: Path) -> Outgoing | None:
    """Return the output that is built at a path and goes to a store; None for any other path."""
    return _outgoing.get(os.path.abspath(path)) if _outgoing else None
