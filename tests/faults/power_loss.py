"""Record what a run does to files, and tell what a disk may hold if the power fails after any of its steps.

The rules are POSIX's, which promise less than ext4 or XFS keep:
- A file's bytes and size are safe once the file is synced; a file's own sync saves none of its names.
- A folder's names are safe once the folder is synced. That saves no name of the folder itself, and no file's bytes.
- Until then each write and each change of a name is there or not, alone, whatever the order in which they were done. A
  file may have the size of a write without its bytes; then they are zeros.
- A rename is one step, as every file system with a journal has it: not both names, nor none. Between two folders it is
  safe once both are synced.
- A write of some bytes is there whole or not at all, since half of one is a file that is not whole either.
Not taken: what was synced is never lost, and names that nobody changes stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Change:
    """A step that is safe once `node` is synced.

    Attributes:
        names: of a folder, name -> node, or None where it is gone.
        write: of a file, (offset, bytes), or the size that it gets.
        source: of a rename from another folder: that one, and the name that is gone there.
    """

    node: int
    names: dict[str, int | None] = field(default_factory=dict)
    write: tuple[int, bytes] | int | None = None
    source: tuple[int, str] | None = None

    @property
    def nodes(self) -> list[int]:
        return [self.node, *(self.source[:1] if self.source else ())]


@dataclass(frozen=True)
class Sync:
    node: int


Step = Change | Sync

SECTOR = 64  # bytes of a torn write that are there or not; a disk's are more, and the tests' files are small

# (number of a step that is not safe, the step) -> kept, lost, or of a write zeros or torn
Fate = Callable[[int, Change], str]


class Recorder:
    """Passes calls on and notes their steps; nodes are the files and folders, whatever their names.

    Args:
        folder: in which all happens, and whose content is safe when the run begins.
    """

    def __init__(self, folder: Path) -> None:
        self.steps: list[Step] = []
        self._folder = folder
        self._count = 0
        self._node: dict[int, int] = {}  # inode number -> node
        self._folders: dict[int, dict[str, int | None]] = {}
        self._temporary: list[Path] = []
        self._top = self._take_in(folder)
        self.start = len(self.steps)

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        changed = arguments[2:] if name == "copy_some" else arguments
        if any(map(self._is_temporary, changed)):
            return real(*arguments)
        return getattr(self, name)(real, *arguments)

    def _is_temporary(self, argument: Any) -> bool:
        """Return whether a path or a file is in a temporary folder. Nothing there is needed after a loss of power."""
        path = argument if isinstance(argument, Path) else getattr(argument, "name", None)
        return isinstance(path, (str, Path)) and any(Path(path).is_relative_to(each) for each in self._temporary)

    def _take_in(self, folder: Path) -> int:
        """Note a folder that is there already, as safe."""
        node = self._new(folder.stat().st_ino)
        self._folders[node] = {}
        for path in folder.iterdir():
            number = path.stat().st_ino
            if path.is_dir():
                inside = self._take_in(path)
            elif number in self._node:  # a second name
                inside = self._node[number]
            else:
                inside = self._new(number)
                self.steps += [Change(inside, write=(0, path.read_bytes())), Sync(inside)]
            self._name(node, {path.name: inside})
        self.steps.append(Sync(node))
        return node

    def _new(self, number: int) -> int:
        self._count += 1
        self._node[number] = self._count
        return self._count

    def _at(self, path: Path) -> int:
        """Return the node that has a name now."""
        node = self._top
        for part in Path(os.path.relpath(path, self._folder)).parts:
            found = self._folders[node][part]
            assert found is not None
            node = found
        return node

    def _name(self, folder: int, names: dict[str, int | None]) -> None:
        self._folders[folder] |= names
        self.steps.append(Change(folder, names))

    def _write(self, file: Any, write: tuple[int, bytes] | int) -> None:
        self.steps.append(Change(self._node[os.fstat(file.fileno()).st_ino], write=write))

    def open_file(self, real: Callable[..., Any], path: Path, mode: str) -> Any:
        is_new = not path.exists()
        file = real(path, mode)
        if is_new:
            self._name(self._at(path.parent), {path.name: self._new(os.fstat(file.fileno()).st_ino)})
        elif mode == "w+b":
            self._write(file, 0)
        return file

    def temporary_folder(self, real: Callable[..., Any]) -> Any:
        folder = real()
        self._temporary.append(Path(folder.name))
        return folder

    def symlink(self, real: Callable[..., Any], path: Path, new: Path) -> None:
        raise AssertionError("links are made in temporary folders alone")

    def open_nameless(self, real: Callable[..., Any], folder: Path) -> Any:
        file = real(folder)
        self._new(os.fstat(file.fileno()).st_ino)
        return file

    def write_some(self, real: Callable[..., Any], file: Any, data: memoryview, offset: int) -> int:
        count: int = real(file, data, offset)
        self._write(file, (offset, bytes(data[:count])))
        return count

    def copy_some(
        self, real: Callable[..., Any], source: Any, start: int, target: Any, offset: int, nbytes: int
    ) -> int:
        count: int = real(source, start, target, offset, nbytes)
        if count:
            self._write(target, (offset, os.pread(source.fileno(), count, start)))
        return count

    def truncate(self, real: Callable[..., Any], file: Any, nbytes: int) -> None:
        real(file, nbytes)
        self._write(file, nbytes)

    def release(self, real: Callable[..., Any], file: Any, offset: int, nbytes: int) -> None:
        real(file, offset, nbytes)
        self._write(file, (offset, os.pread(file.fileno(), nbytes, offset)))

    def sync(self, real: Callable[..., Any], file: Any) -> None:
        real(file)
        self.steps.append(Sync(self._node[os.fstat(file.fileno()).st_ino]))

    sync_early = sync

    def sync_folder(self, real: Callable[..., Any], folder: Path) -> None:
        real(folder)
        self.steps.append(Sync(self._at(folder)))

    def rename(self, real: Callable[..., Any], path: Path, new: Path) -> None:
        real(path, new)
        node, folder = self._at(path), self._at(path.parent)
        if folder == (target := self._at(new.parent)):
            self._name(folder, {path.name: None, new.name: node})
            return
        self._folders[folder] |= {path.name: None}
        self._folders[target] |= {new.name: node}
        self.steps.append(Change(target, {new.name: node}, source=(folder, path.name)))

    def link(self, real: Callable[..., Any], path: Path, new: Path) -> None:
        real(path, new)
        self._name(self._at(new.parent), {new.name: self._at(path)})

    def unlink(self, real: Callable[..., Any], path: Path) -> None:
        is_there = os.path.lexists(path)
        real(path)
        if is_there:
            self._name(self._at(path.parent), {path.name: None})

    def make_folder(self, real: Callable[..., Any], path: Path) -> None:
        new = [each for each in (path, *path.parents) if not each.exists()]
        real(path)
        for each in reversed(new):
            node = self._new(each.stat().st_ino)
            self._folders[node] = {}
            self._name(self._at(each.parent), {each.name: node})

    def remove_empty_folder(self, real: Callable[..., Any], path: Path) -> None:
        real(path)
        self._name(self._at(path.parent), {path.name: None})

    def remove_folder(self, real: Callable[..., Any], path: Path) -> None:
        inside = list(os.walk(path, topdown=False))
        real(path)
        for place, folders, files in inside:
            for name in (*files, *folders):
                self._name(self._at(Path(place)), {name: None})
        self._name(self._at(path.parent), {path.name: None})

    def unsafe(self, steps: int) -> list[int]:
        """Return which of the first steps are not safe yet."""
        done = self.steps[:steps]
        synced = {step.node: number for number, step in enumerate(done) if isinstance(step, Sync)}
        changes = ((number, step) for number, step in enumerate(done) if isinstance(step, Change))
        return [number for number, step in changes if any(synced.get(node, -1) < number for node in step.nodes)]

    def ways(self, steps: int, draws: int) -> dict[str, Fate]:
        """Return the fates to try: those of FATES, some that are drawn, and each name's alone against all others'."""
        ways = {**FATES, **{f"draw {seed}": _drawn(seed) for seed in range(draws)}}
        for number in self.unsafe(steps):
            step = self.steps[number]
            if isinstance(step, Change) and step.names:
                ways |= {f"only {step.names}": _alone(number, "kept"), f"all but {step.names}": _alone(number, "lost")}
        return ways

    def after(self, steps: int, fate: Fate) -> dict[str, bytes]:
        """Return the files on the disk, as `files_of` does, if the power fails after some steps.

        Args:
            fate: of each step that is not safe.
        """
        done, unsafe = self.steps[:steps], set(self.unsafe(steps))
        contents: dict[int, bytearray] = {}
        folders: dict[int, dict[str, int | None]] = {self._top: {}}
        for number, step in enumerate(done):
            if isinstance(step, Sync):
                continue
            told = fate(number, step) if number in unsafe else "kept"
            if told == "lost":
                continue
            if step.write is None:
                folders.setdefault(step.node, {}).update(step.names)
                if step.source:
                    folders.setdefault(step.source[0], {})[step.source[1]] = None
            else:
                _apply(contents.setdefault(step.node, bytearray()), step.write, told, number)
        is_folder = self._folders.keys()
        return dict(_listed(self._top, "", folders, contents, is_folder))


def _apply(content: bytearray, write: tuple[int, bytes] | int, told: str, number: int) -> None:
    if isinstance(write, int):
        del content[write:]
        content.extend(bytes(write - len(content)))
        return
    offset, data = write
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    if told == "torn":
        draw = Random(number)
        for start in range(0, len(data), SECTOR):
            if draw.random() < 0.5:
                content[offset + start : offset + min(start + SECTOR, len(data))] = data[start : start + SECTOR]
    elif told != "zeros":
        content[offset : offset + len(data)] = data


def _listed(node: int, path: str, folders: Any, contents: Any, is_folder: Any) -> Iterator[tuple[str, bytes]]:
    if node not in is_folder:
        yield path, bytes(contents.get(node, b""))
        return
    names = {name: inside for name, inside in folders.get(node, {}).items() if inside is not None}
    if not names and path:
        yield path, b"/"
    for name, inside in names.items():
        yield from _listed(inside, f"{path}/{name}".lstrip("/"), folders, contents, is_folder)


# What becomes of what was not synced
FATES: dict[str, Fate] = {
    "all": lambda number, step: "kept",
    "nothing": lambda number, step: "lost",
    "names": lambda number, step: "kept" if step.names else "lost",
    "names and sizes": lambda number, step: "kept" if step.names else "zeros",
    "bytes": lambda number, step: "lost" if step.names else "kept",
}


def _alone(alone: int, fate: str) -> Fate:
    """Return the fate by which one name has this fate and no other name has it; bytes are kept."""
    other = "lost" if fate == "kept" else "kept"
    return lambda number, step: fate if number == alone else other if step.names else "kept"


def _drawn(seed: int) -> Fate:
    """Return a fate that is drawn for each step, the same for the same seed and number of the step."""
    return lambda number, step: Random(f"{seed} {number}").choice(
        ("kept", "lost") if step.names else ("kept", "lost", "zeros")
    )
