"""Change a model in place: what `merge`, `unmerge`, `apply` and `recover` share (`durable.in_place` has the protocol).

A command plans as for an output of its own, and refuses before a byte changes. Then it takes the model from its place,
plans again from there, and makes its windows new. So `recover`, after a death, does what the command does: it reads the
call from the journal and goes on.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..adapters.adapter import Adapter
from ..binding.modules.beside import reading_weights
from ..binding.modules.placement import Placement
from ..durable import disk
from ..durable.fileio import copy_file, free_bytes, size, write_file
from ..durable.in_place import ModelInPlace, Move, holders, open_elsewhere
from ..durable.interrupts import DEATHS, changing_models, unless_done
from ..durable.partial import journal_path, partial_path
from ..errors import InputError, MachineError, NeedsFlag, UsageError, shell_word
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.containers.layouts import read_layout
from ..files.folder.side_files import undo_files
from ..files.output.output import Output, OutputFile
from ..files.stores.links import parse_store_link
from ..files.weights_file import WeightsFile
from ..streaming.digests import hashes_of_tensors
from ..streaming.in_place import WINDOW
from ..streaming.parallel import Progress, worker_count
from ..streaming.ranks import current_job
from ..streaming.rewrite import RESULTS
from ..undo.reader import UndoFile
from ..undo.writer import read_placements
from .adapter_requests import parse_adapters
from .arguments import parse_paths, parse_words
from .calls import Call

R = TypeVar("R")

C = TypeVar("C", bound=Call[Any])

Hashes = dict[str, list[str]]  # a tensor's name -> the hashes of its pieces

ELSEWHERE, COPY = "write another model with -o", "copy it first, and name the copy"

NOT_REMEMBERED = ("progress", "dry_run", "device", "workers")  # which decide about no byte

PART = 16  # a 16th of the model is as much as undo records and their copy take, with some room


class Windows(Protocol):
    """What changes a model, window by window. A window has the same number in every run."""

    def make_new(self, model: ModelInPlace, progress: Progress | None) -> None:
        """Make all windows new that are old."""

    def make_old(self, model: ModelInPlace) -> None:
        """Make all windows old that are new."""


@dataclass(frozen=True)
class PlannedChange(Generic[R]):
    """A change in place that is planned, with the model open where it is meanwhile.

    Attributes:
        windows: what is to be done.
        finish: called when all windows are new; returns the report, and the moves of small files that are left to do.
    """

    windows: Windows
    finish: Callable[[], tuple[R, Sequence[Move]]]


@dataclass(frozen=True)
class Planned(Generic[R]):
    """A change in place that nothing speaks against.

    Attributes:
        report: of a dry run.
        way: by shard or by window.
        files: the names of the weights files.
        is_done: nothing is left to change.
    """

    report: R
    way: str
    files: Sequence[str]
    is_done: bool = False


# Opens a model that is taken from its place, and plans the change: the same plan whatever windows are new already
Prepare = Callable[[ModelInPlace], AbstractContextManager[PlannedChange[R]]]


def change_in_place(call: Call[R], path: Path, plan: Callable[[], Planned[R]], prepare: Prepare[R]) -> R:
    """Run a call that changes a model in place, or go on with it after a death.

    Args:
        path: of the model.
        plan: checks everything, and changes nothing.
    """
    options: dict[str, Any] = vars(call)
    for name, word in {"out": "-o", "resume": "--resume", "force": "--force"}.items():
        if options.get(name):
            message = f"--in-place and {word} exclude each other"
            raise UsageError(message, culprit="--in-place", remedy=f"leave out {word}")
    if current_job().count > 1:
        message = "changes in place are made by one process"
        raise UsageError(message, culprit="torchrun", remedy=f"start loratool alone, or {ELSEWHERE}")
    model = ModelInPlace(path, RESULTS)
    if os.path.isdir(model.folder):
        with model.locked():
            model.open()
            if model.is_changing:
                if options["dry_run"] or call_of(model) != remember(call):
                    raise under_way(path)
                return end_forward(model, prepare, options["progress"])
            was_new = model.is_new
            model.end()
            if was_new:
                message = "is changed already: a call ended just before its process died"
                raise InputError(message, culprit=str(path), remedy="call again to change it once more")
    require_changeable(path)
    planned = plan()
    if options["dry_run"] or planned.is_done:
        return planned.report
    with model.locked():
        if model.is_changing or not os.path.lexists(path):
            raise under_way(path)
        with unless_done(partial(_note, model)):
            try:
                model.begin({"options": remember(call), "way": {"by": planned.way}})
                if planned.way == "window":
                    _refuse_open([model.place(name) for name in planned.files], parse_words(options["allow"]))
                model.open()
            except Exception:
                with suppress(OSError):
                    model.end()
                raise
        return end_forward(model, prepare, options["progress"])


def _note(model: ModelInPlace) -> None:
    """Note that a model is left away from its place, for the message."""
    if model.is_changing:
        changing_models.append(str(model.path))


def end_forward(model: ModelInPlace, prepare: Prepare[R], progress: Progress | None = None) -> R:
    """End a change forward. If its inputs turn out to be wrong, all is taken back before the error is raised."""
    with unless_done(partial(_note, model)):
        try:
            model.move(is_new=False)
            with prepare(model) as change:
                try:
                    change.windows.make_new(model, progress)
                    report, moves = change.finish()
                except DEATHS:
                    raise
                except Exception:
                    change.windows.make_old(model)
                    raise
        except DEATHS:
            raise
        except Exception:
            if not model.windows:
                require_old(model)
                model.end()
            raise
        model.plan_moves(moves)
        model.move(is_new=True)
        model.end()
        return report


def end_back(model: ModelInPlace, prepare: Prepare[R]) -> None:
    """End a change backward."""
    model.move(is_new=False)
    if model.windows:
        with prepare(model) as change:
            change.windows.make_old(model)
    require_old(model)
    model.end()


def way_of(model: ModelInPlace) -> str:
    """Return how the files are changed: by shard or by window."""
    return str((model.head() or {}).get("way", {}).get("by"))


def call_of(model: ModelInPlace) -> dict[str, Any]:
    """Return the call that changes a model, as `remember` made it; empty if it never began."""
    return dict((model.head() or {}).get("options", {}))


def under_way(path: Path) -> InputError:
    """Return the error for a model that another call is changing."""
    remedy = f"loratool recover {shell_word(path)} ends that, and with --back takes it back"
    return InputError("is in the middle of another change in place", culprit=str(path), remedy=remedy)


def remember(call: Call[Any]) -> dict[str, Any]:
    """Return a call as JSON values, with the paths of its inputs complete, so that it can be repeated from anywhere."""
    remembered: dict[str, Any] = {"command": call.name()}
    arguments = signature(type(call)).parameters
    for name, argument in arguments.items():
        value = getattr(call, name)
        if value == argument.default or name in NOT_REMEMBERED:
            continue
        elif name == next(iter(arguments)):
            remembered[name] = os.path.abspath(value)  # it has no name while it changes
        elif name in ("adapters", "replace") and value is not None:
            requests = parse_adapters(value)
            remembered[name] = [[_complete(each.path), each.weight, dict(each.module_weights)] for each in requests]
        elif name == "patches":
            remembered[name] = [_complete(each) for each in parse_paths(value)]
        elif isinstance(value, str | os.PathLike):
            remembered[name] = _complete(value)
        else:
            remembered[name] = list(value) if isinstance(value, tuple) else value
    return remembered


def recall(kind: type[C], remembered: dict[str, Any], path: Path) -> C:
    """Return the call that `remember` was given. path: of the model."""
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in remembered.items()
        if name != "command"
    }
    for name in ("adapters", "replace"):
        if values.get(name):
            values[name] = [(each, weight, parts) for each, weight, parts in values[name]]
    return kind(**{**values, next(iter(signature(kind).parameters)): os.fspath(path)})


def _complete(value: str | os.PathLike[str]) -> str:
    text = os.fspath(value)
    return os.path.abspath(text) if os.path.exists(text) else text


def refuse_store(path: Path) -> None:
    """Raise InputError for a link to a store."""
    if not os.path.lexists(path) and (link := parse_store_link(str(path))):
        raise InputError("is in a store: files are changed in place only here", culprit=str(link), remedy=COPY)


def require_changeable(path: Path) -> None:
    """Raise an error for a model that cannot be renamed, or of which other names or programs would see the change."""
    refuse_store(path)
    if not os.path.lexists(path):
        raise InputError("is no file or folder here", culprit=str(path), remedy="download it first, or check the name")
    if path.is_symlink():
        raise InputError("is a link: what it leads to may be others' too", culprit=str(path), remedy=COPY)
    if os.path.ismount(path):
        raise InputError("is a mount point, which cannot be renamed", culprit=str(path), remedy=ELSEWHERE)
    if Path.cwd().is_relative_to(path.absolute()):
        raise UsageError("is the working folder", culprit=str(path), remedy="call from another folder")
    for place in (path.absolute().parent, *([path] if path.is_dir() else [])):
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError("nothing can be written into this folder", culprit=str(place), remedy=ELSEWHERE)
    for place in (partial_path(path), journal_path(path)):
        if os.path.lexists(place):
            message = "is of a run that writes this model, or that died doing so"
            raise InputError(message, culprit=str(place), remedy="end it with --resume, or remove it")


def refuse_inside(inputs: Iterable[Path], path: Path) -> None:
    """Raise InputError for an input in a model's folder, or on a way through it, as it has no name while it changes."""
    model = path.resolve()
    for place in inputs:
        if any(each.resolve().is_relative_to(model) for each in (place, *place.parents)):
            message = "is inside the model, which has no name while it changes"
            raise InputError(message, culprit=str(place), remedy="move it elsewhere")


def require_own_rows(placements: Mapping[str, Iterable[Placement]]) -> None:
    """Raise InputError for a tensor whose change depends on another one, which may have changed before."""
    for name in reading_weights(placements):
        what = "changes by a product with its module's weight, which changes too"
        raise InputError(what, culprit=name, remedy=ELSEWHERE)


def former_placements(undo: UndoFile, adapters: Sequence[Adapter]) -> dict[str, list[Placement]]:
    """Return the placements of the merge that an undo file is of. adapters: in the order of its index."""
    names = undo.index["tensors"].keys() & undo.specs.keys()
    return {name: read_placements(undo.index, name, undo.specs[name], adapters) for name in sorted(names)}


def choose_way(model: Checkpoint, path: Path, by: str | None, new: Sequence[OutputFile] = ()) -> str:
    """Return how the files are changed: by shard or by window.

    Args:
        new: the files with their new headers, which only files that are written anew can have; by default they stay.

    Raises:
        InputError: a weights file is a link, has another name, or cannot be written; or files are of torch.
        MachineError: there is no room.
    """
    for shard in model.shards:
        status = shard.path.lstat()
        if shard.path.is_symlink():
            raise InputError("is a link, as in a cache that others read", culprit=str(shard.path), remedy=COPY)
        if not os.access(shard.path, os.W_OK):
            raise InputError("cannot be written to", culprit=str(shard.path), remedy=ELSEWHERE)
        if status.st_nlink > 1 and by != "shard":
            by_shard = "--by shard changes this name alone"
            raise InputError("has another name, which would change too", culprit=str(shard.path), remedy=by_shard)
    if new and [file.header for file in new] != [file.header for file in files_of(model)]:
        if by == "window":
            remedy = f"leave out --by window, or {ELSEWHERE}"
            raise InputError("has other headers than the base", culprit=str(path), remedy=remedy)
        by = "shard"
    largest, total = max(shard.nbytes for shard in model.shards), sum(shard.nbytes for shard in model.shards)
    beside = total // PART
    free = free_bytes(path.absolute().parent)
    way = by or ("shard" if largest + beside <= free else "window")
    needed = (largest if way == "shard" else min(WINDOW, total)) + beside
    if needed > free:
        message = f"{size(needed)} are needed to change it by {way} and {size(free)} are free"
        raise MachineError(message, culprit=str(path), remedy="free some space")
    return way


def _refuse_open(shards: Sequence[Path], allow: Collection[str]) -> None:
    """Raise an error if a program has a weights file open."""
    for shard in shards:
        found = open_elsewhere(shard)
        if found:
            pids = ", ".join(map(str, holders(shard)))
            who = f"is open in another program{f' (process {pids})' if pids else ''}, which would read a mixture"
            raise InputError(
                who, culprit=str(shard), remedy="end it, or use --by shard, which lets it keep the former file"
            )
        if found is None and "open-files" not in allow:
            message = "may be open in another program, which this system cannot tell"
            raise NeedsFlag(message, culprit=str(shard), flags="--allow open-files", why=", or --by shard")


def require_layout(output: Output, files: Sequence[OutputFile], model: Checkpoint) -> None:
    """Raise InputError for a change that a model's files have no room for: new types, shapes, tensors or files."""
    for name, spec in output.specs.items():
        if model.stored.get(name) != spec:
            was = model.stored.get(name)
            what = f"is {was}, and would be {spec}" if was else f"would be new ({spec})"
            raise InputError(f"{what}, which no change in place can store", culprit=name, remedy=ELSEWHERE)
    for name in model.stored:
        if name not in output.specs:
            raise InputError("would be removed, which no change in place can do", culprit=name, remedy=ELSEWHERE)
    if sorted(file.name for file in files) != sorted(file.name for file in files_of(model)):
        raise InputError("would have other files", culprit=str(model.path), remedy=ELSEWHERE)


def files_of(model: Checkpoint) -> list[OutputFile]:
    """Return the files of a model as they are, by their paths in its folder."""
    return [
        file_of(shard, shard.path.name if model.given_as_file else shard.path.relative_to(model.root).as_posix())
        for shard in model.shards
    ]


def file_of(shard: WeightsFile, name: str) -> OutputFile:
    """Return a weights file as it is, to be written again under a name.

    Raises:
        InputError: it is a torch file, or another that is only read.
    """
    if shard.header is None or shard.scattered:
        message = "is a torch file or another that is only read, and cannot be changed in place"
        raise InputError(message, culprit=str(shard.path), remedy=ELSEWHERE)
    return OutputFile(name, read_layout(shard.header, shard.path).head, dict(shard.begin), shard.nbytes)


def shards_of(model: Checkpoint, files: Sequence[OutputFile]) -> dict[str, WeightsFile]:
    """Return the open files of a model by the names of `files_of`."""
    return {file.name: shard for file, shard in zip(files, model.shards, strict=True)}


def base_facts(
    model: ModelInPlace,
    plan: str,
    files: Sequence[OutputFile],
    read: Callable[[], tuple[Hashes, Hashes]],
) -> tuple[list[OutputFile], Hashes]:
    """Return what is known of a model from before its first window changed: its files, and hashes of the base.

    Args:
        plan: what tells this plan from that of other inputs.
        files: as they are now.
        read: reads the hashes of the pieces of the base's tensors, as far as they are needed, and of the tensors that
            change as the model has them.

    Raises:
        InputError: the plan is another one than when the change began.
    """
    if not model.is_resumed:
        hashes, old = read()
        text = json.dumps({"plan": plan, "files": _layouts(files), "hashes": hashes, "old": old}).encode()
        new = model.facts.with_suffix(".new")  # renamed when it is complete
        write_file(new, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        disk.rename(new, model.facts)
        disk.sync_folder(model.folder)
    facts = _read_facts(model)
    if facts["plan"] != plan:
        what = "is in the middle of a change with other inputs: an adapter or a patch has changed since"
        raise InputError(what, culprit=str(model.path), remedy="bring back the former inputs, and recover again")
    former = [OutputFile(name, b64decode(head), begin, nbytes) for name, head, begin, nbytes in facts["files"]]
    return former, facts["hashes"]


def _layouts(files: Sequence[OutputFile]) -> list[list[Any]]:
    return [[each.name, b64encode(each.header).decode(), dict(each.begin), each.nbytes] for each in files]


def _read_facts(model: ModelInPlace) -> dict[str, Any]:
    data = model.facts.read_bytes() if model.facts.exists() else b""
    total, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != total:
        raise model.damaged(model.facts)
    facts: dict[str, Any] = json.loads(text)
    return facts


def require_old(model: ModelInPlace, names: Collection[str] | None = None) -> None:
    """Raise InputError unless a model, of which no window is new, is what it was before the change.

    Args:
        names: of tensors that are not new; by default all.
    """
    if not (model.has_entries or model.facts.exists()):
        return
    facts = _read_facts(model)
    with closing(open_checkpoint(model.model)) as now:
        was = {name: found for name, found in facts["old"].items() if names is None or name in names}
        found = hashes_of_tensors(now.shard_of, was.keys() & now.stored.keys(), worker_count())
        wrong = next((name for name in was if found.get(name) != was[name]), None)
        if wrong is not None or (names is None and _layouts(files_of(now)) != facts["files"]):
            raise not_recovered(model, wrong)


def not_recovered(model: ModelInPlace, tensor: str | None) -> InputError:
    """Return the error for a model that turns out to be neither old nor new."""
    what = f"{f'has {tensor}, which ' if tensor else ''}is neither old nor new: its journal was damaged, or its files"
    return InputError(what, culprit=str(model.folder), remedy="bring back what was damaged, or the model from a copy")


def stage(model: ModelInPlace, files: Mapping[str, bytes | Path | None]) -> list[Move]:
    """Write small files, and return the moves that put them into the model's folder. None: the file is removed."""
    folder, moves = model.folder.name, list[Move]()
    for name, content in sorted(files.items()):
        place, inside, now = model.folder / "new" / name, f"{folder}/{model.path.name}/{name}", model.model / name
        if now.exists():
            if (isinstance(content, Path) and filecmp.cmp(content, now, shallow=False)) or (
                isinstance(content, bytes) and now.read_bytes() == content
            ):
                continue
            moves.append(Move(inside, f"{folder}/former/{name}"))
        if content is None:
            continue
        model.make_folder(place.parent)
        if isinstance(content, Path):
            copy_file(content, place)
        else:
            write_file(place, content)
        disk.sync_folder(place.parent)
        moves.append(Move(f"{folder}/new/{name}", inside))
    return moves


def renamed_undo(model: ModelInPlace, undo: Path, new: Path | None, replaces: bool = False) -> list[Move]:
    """Return the moves of a model's undo files: those of earlier merges get the next numbers, or the former ones.

    Args:
        undo: the place of the last merge's, below the model's own place.
        new: the file that will be there; None if the last merge is undone.
        replaces: the new merge is in the place of the last one.
    """
    is_inside = undo.is_relative_to(model.path)
    folder = Path(model.folder.name, undo.parent.relative_to(model.path.parent)) if is_inside else Path()
    there = undo_files(model.path.absolute().parent / folder / undo.name)
    names = [f"{folder}/{undo.name}{f'.{number}' if number else ''}" for number in range(len(there) + 1)]
    away = Move(names[0], f"{model.folder.name}/former/{undo.name}")
    if new and replaces:
        return [away, Move(f"{model.folder.name}/{new.relative_to(model.folder).as_posix()}", names[0])]
    if new:
        moves = [Move(names[number], names[number + 1]) for number in reversed(range(len(there)))]
        return [*moves, Move(f"{model.folder.name}/{new.relative_to(model.folder).as_posix()}", names[0])]
    moves = [Move(names[number], names[number - 1]) for number in range(1, len(there))]
    return [away, *moves] if there else []
