"""Change a model where it is, so that no program loads a mixture, and after any death both ways are open.

While it changes, the model is in a folder beside its place, so nobody finds it by its name:

    MODEL.loratool-in-place/
        MODEL                    the model
        log.loratool-journal/    the call (head.json), and an entry for each step (0): see `journal`
        image                    the bytes that the next entry puts into the model's files
        shard-N                  or a whole file, that entry N puts in the place of the former one
        new/, former/            small files that wait for their place, and those that they replace
        renaming                 there from before the first of these is moved until all are moved back

A step puts a window, some ranges of the model's files, from its old to its new bytes, or back. Its bytes are written to
the image and synced; then its entry is added and synced, which has what a step back needs (undo records); then the
image is copied over the model's bytes, and synced. So the new bytes and the way back are both safe before the first old
byte is gone. After a death the last entry's image is copied once more, which changes nothing if it was complete. An
image that does not match the last entry was of a window without one: then the last entry's window was synced.

When all windows are new, a list of moves is added: renames of small files and undo files, none over another file, each
with an entry of its own. So they can be taken back as well. At last the model gets its name again.

If entries are lost, the windows of the last ones are new and taken to be old. So after a death the old or the new model
is proven by hashes before it gets its name, and `renaming` tells that a list of moves was lost.

Not covered: disks that lose what they reported as synced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, UsageError
from . import disk
from .fileio import copy_range, sum_range
from .journal import Journal, read_head
from .locks import locked
from .partial import journal_head, journal_path

Range = tuple[str, int, int]  # of a file's bytes: its name in the model's folder, the first byte, the number of bytes


def in_place_folder(path: Path) -> Path:
    """Return the folder that has a model while it is changed in place."""
    return path.with_name(path.name + ".loratool-in-place")


def own_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that ends with the model's name, and does not lead through the model, as `model/../model` does."""
    given = Path(path)
    if not given.name or given.name == "..":
        return given.resolve()
    return given.parent.resolve() / given.name if ".." in given.parts else given


def _ended_folders(path: Path) -> Iterator[Path]:
    """Yield the names of which the folder gets the first free one when the change has ended, before it is removed."""
    return (path.with_name(f"{path.name}.loratool-ended-{number}") for number in count(1))


@dataclass(frozen=True)
class Move:
    """A rename, as paths relative to the folder that has the model under its own name."""

    source: str
    target: str


class ModelInPlace:
    """A model that is changed where it is.

    Args:
        path: of the model under its own name: a file or a folder.
        kinds: as in `Journal`, of the results of windows.

    Attributes:
        model: its path while it changes.
        windows: the number of each window that is new -> the entry that made it so.
        moves: the moves at the end; None while some windows are old.
        moved: how many of them are done.
        is_resumed: whether another process has begun it.
    """

    def __init__(self, path: Path, kinds: Mapping[str, type]) -> None:
        self.path, self.folder = path, in_place_folder(path)
        self.model = self.folder / path.name
        self.windows: dict[int, int] = {}
        self.moves: list[Move] | None = None
        self.moved = 0
        self.is_resumed = False
        self._log = self.folder / "log"
        self._journal = Journal(self._log, kinds)
        self._opened = ExitStack()
        self._image: BinaryIO | None = None
        self._targets: dict[str, BinaryIO] = {}
        self._entries = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process during the block; create it unless it exists.

        Raises:
            MachineError: another process holds it.
        """
        with locked(self.folder, self.path, lambda: disk.make_folder(self.folder)), self._opened:
            yield

    @property
    def is_changing(self) -> bool:
        """Return whether the model is in the folder, and not at its place."""
        return os.path.lexists(self.model)

    @property
    def has_entries(self) -> bool:
        """Return whether a step was ever noted."""
        return self._entries > 0

    @property
    def is_new(self) -> bool:
        """Return whether the change is complete, once it is open."""
        return self.moves is not None and self.moved == len(self.moves)

    def head(self) -> dict[str, Any] | None:
        """Return the head of the journal: None before the change began.

        Raises:
            InputError: it is damaged.
        """
        try:
            head = read_head(self._log)
        except UsageError as error:
            raise self.damaged(journal_head(self._log)) from error
        if head is not None and head.pop("sum", None) != _sum({kind: head[kind] for kind in head.keys() - {"version"}}):
            raise self.damaged(journal_head(self._log))
        return head

    def damaged(self, place: Path) -> InputError:
        """Return the error for a file of the change that is not as it was written."""
        what = "is damaged, or missing, or of another version of loratool"
        return InputError(what, culprit=str(place), remedy="bring it back, or the model from a copy")

    def begin(self, head: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the head, and take the model from its place.

        Args:
            head: kind -> name -> JSON value: all that is needed to go on after a death.
        """
        for left in takewhile(Path.exists, _ended_folders(self.path)):
            with suppress(OSError):  # another process may be removing it
                disk.remove_folder(left)
        self._journal.begin({**head, "sum": _sum(head)})
        disk.open_file(self._image_path, "w+b").close()
        for folder in (journal_path(self._log), self.folder, self.path.absolute().parent):
            disk.sync_folder(folder)
        disk.rename(self.path, self.model)
        self._sync_names()

    def open(self) -> None:
        """Read the journal, and complete the step of the last entry."""
        if self.head() is None:
            if self.is_changing:
                raise self.damaged(journal_head(self._log))
            return
        self._journal.open(is_complete=True)
        if sorted(self._journal.finished) != list(range(len(self._journal.finished))):
            raise self.damaged(journal_path(self._log) / "0")
        disk.sync_folder(journal_path(self._log))
        last: list[Any] | None = None
        for number in sorted(self._journal.finished):
            last = self._journal.results(number)
            self._entries = number + 1
            self._take_in(number, last)
        if not self.is_changing:
            return
        self.is_resumed = self._entries > 0 or self.facts.exists()
        if self.moves is None and self._renaming.exists():
            raise self.damaged(journal_path(self._log) / "0")
        if not self._image_path.exists():
            raise self.damaged(self._image_path)
        self._image = self._opened.enter_context(disk.open_file(self._image_path, "r+b"))
        for place in self.folder.glob("shard-*"):
            if int(place.name.partition("-")[2]) >= self._entries:
                disk.unlink(place)
        if last and last[0] == "window":
            *_, ranges, total, _ = last
            nbytes = sum(length for *_, length in ranges)
            if os.fstat(self._image.fileno()).st_size >= nbytes and sum_range(self._image, 0, nbytes) == total:
                self._copy_image(ranges)
        elif last and last[0] == "file" and self.new_file(self._entries - 1).exists():
            self._put_file(last[3], self._entries - 1)

    def close(self) -> None:
        """Close all files."""
        self._journal.close()
        self._targets.clear()
        self._opened.close()

    @property
    def facts(self) -> Path:
        """Return the place of what is to be known of the model as it was."""
        return self.folder / "facts.json"

    @property
    def _renaming(self) -> Path:
        return self.folder / "renaming"

    @property
    def _image_path(self) -> Path:
        return self.folder / "image"

    @property
    def image(self) -> BinaryIO:
        """Return the file into which the bytes of the next window are written, one range after the other."""
        assert self._image, "it is open"
        return self._image

    def new_file(self, entry: int | None = None) -> Path:
        """Return the path of the file that an entry, by default the next, puts in the place of one of the model's."""
        return self.folder / f"shard-{self._entries if entry is None else entry}"

    def place(self, name: str) -> Path:
        """Return the path of one of the model's files while it changes."""
        return self.model if self.model.is_file() else self.model / name

    def put_window(self, number: int, is_new: bool, ranges: Sequence[Range], results: Any) -> None:
        """Put the image into the model's files.

        Args:
            is_new: whether the window is new then, or old again.
            ranges: its bytes in the model's files, in the order of the image.
            results: what is kept of it, with what a step back needs.
        """
        disk.sync(self.image)
        nbytes = sum(length for *_, length in ranges)
        self._add(["window", number, is_new, list(ranges), sum_range(self.image, 0, nbytes), results])
        self._copy_image(ranges)

    def put_file(self, number: int, is_new: bool, name: str, results: Any) -> None:
        """Put the file at `new_file`, which is synced, in the place of one of the model's files."""
        disk.sync_folder(self.folder)
        self._add(["file", number, is_new, name, results])
        self._put_file(name, self._entries - 1)

    def _put_file(self, name: str, entry: int) -> None:
        place = self.place(name)
        disk.rename(self.new_file(entry), place)
        disk.sync_folder(place.parent)

    def _copy_image(self, ranges: Sequence[Range]) -> None:
        done, targets = 0, dict[str, BinaryIO]()
        for name, first, nbytes in ranges:
            if name not in self._targets:
                self._targets[name] = self._opened.enter_context(disk.open_file(self.place(name), "r+b"))
            targets[name] = self._targets[name]
            copy_range(self.image, done, targets[name], first, nbytes)
            done += nbytes
        for target in targets.values():
            disk.sync(target)

    def _add(self, entry: list[Any]) -> None:
        self._journal.add(self._entries, ("", 0, 0), "", entry)
        self._journal.sync()
        self._take_in(self._entries, entry)
        self._entries += 1

    def _take_in(self, number: int, entry: list[Any]) -> None:
        kind, value, *rest = entry
        if kind == "moves":
            self.moves, self.moved = None if value is None else [Move(*each) for each in value], 0
        elif kind == "move":
            self.moved = value + bool(rest[0])
        elif rest[0]:
            self.windows[value] = number
        else:
            self.windows.pop(value, None)

    def results(self) -> Iterator[tuple[int, Any]]:
        """Yield each new window's number, and what was kept of it; bytes are `StoredBytes`."""
        self._journal.read_all(1)
        for window, entry in sorted(self.windows.items()):
            yield window, self._journal.results(entry)[-1]

    def make_folder(self, path: Path) -> None:
        """Create a folder and those above it, and sync their names."""
        new = [each for each in (path, *path.parents) if not each.exists()]
        disk.make_folder(path)
        for each in new:
            disk.sync_folder(each.parent)

    def plan_moves(self, moves: Sequence[Move]) -> None:
        """Note what is to be renamed at the end; all windows are new, and the files that wait in `new` are synced."""
        disk.sync_folder(self.folder)
        self._add(["moves", [[each.source, each.target] for each in moves]])

    def move(self, is_new: bool) -> None:
        """Do all moves; or take back those that were done, after which none are planned."""
        moves, parent = self.moves or [], self.path.absolute().parent
        if is_new and moves and not self._renaming.exists():
            disk.open_file(self._renaming, "w+b").close()
            disk.sync_folder(self.folder)
        there = {name for each in moves for name in (each.source, each.target) if os.path.lexists(parent / name)}
        if not _after(moves, self.moved) <= there:  # it died before it could note the last one
            done = _after(moves, self.moved + 1) <= there
            if not (done or _after(moves, self.moved - 1) <= there):
                raise self.damaged(journal_path(self._log) / "0")
            self._add(["move", self.moved if done else self.moved - 1, done])
        for number in range(self.moved, len(moves)) if is_new else reversed(range(self.moved)):
            source, target = parent / moves[number].source, parent / moves[number].target
            source, target = (source, target) if is_new else (target, source)
            if os.path.lexists(target):
                message = "is in the way of a file that a change in place puts there"
                raise InputError(message, culprit=str(target), remedy="move it away, and recover again")
            self.make_folder(target.parent)
            disk.rename(source, target)
            disk.sync_folder(target.parent)
            disk.sync_folder(source.parent)
            self._add(["move", number, is_new])
        if not is_new and self.moves is not None:
            if self._renaming.exists():
                disk.unlink(self._renaming)
                disk.sync_folder(self.folder)
            self._add(["moves", None])

    def end(self) -> None:
        """Put the model back at its place, and remove the folder."""
        self.close()
        if self.is_changing:
            if os.path.lexists(self.path):
                message = f"is in the way of the model of this name, which waits in {self.folder.name}"
                raise InputError(message, culprit=str(self.path), remedy="move it away, and recover again")
            disk.rename(self.model, self.path)
            self._sync_names()
        ended = next(each for each in _ended_folders(self.path) if not each.exists())
        disk.rename(self.folder, ended)
        disk.sync_folder(self.path.absolute().parent)
        with suppress(OSError):  # the next change removes what this one cannot
            disk.remove_folder(ended)

    def _sync_names(self) -> None:
        disk.sync_folder(self.path.absolute().parent)
        disk.sync_folder(self.folder)


def _after(moves: Sequence[Move], count: int) -> set[str]:
    """Return the names that are there after so many of the moves."""
    there, seen = set[str](), set[str]()
    for each in moves:
        there |= {each.source} - seen
        seen |= {each.source, each.target}
    for each in moves[: max(0, count)]:
        there = (there - {each.source}) | {each.target}
    return there


def _sum(head: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def open_elsewhere(path: Path) -> bool | None:
    """Return whether a program has a file open or mapped; None if the system cannot tell. Nobody may open it meanwhile.

    Linux grants a write lease only on a file that is open nowhere else (fcntl(2), F_SETLEASE).
    """
    try:
        import fcntl

        set_lease: int = fcntl.F_SETLEASE
    except (ImportError, AttributeError):
        return None
    with open(path, "rb") as file:
        try:
            fcntl.fcntl(file.fileno(), set_lease, fcntl.F_WRLCK)
        except BlockingIOError:
            return True
        except OSError:
            return None
        fcntl.fcntl(file.fileno(), set_lease, fcntl.F_UNLCK)
    return False


def holders(path: Path) -> list[int]:
    """Return the processes that have a file open or mapped, as far as this user may see them."""
    status, found = path.stat(), set[int]()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.stat(each) for each in (process / "fd").iterdir()]
            mapped = [os.stat(each) for each in (process / "map_files").iterdir()]
        except OSError:
            continue
        if any(os.path.samestat(status, each) for each in (*opened, *mapped)):
            found.add(int(process.name))
    return sorted(found - {os.getpid()})
