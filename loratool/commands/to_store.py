"""Run a command whose output goes to a store: it writes into a folder of the cache, from which the parts are sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from ..durable import disk, elsewhere
from ..durable.interrupts import unless_done
from ..durable.locks import locked
from ..durable.partial import what_stays
from ..errors import InputError, MachineError, NeedsFlag, UsageError, shell_word, show_as, without_credentials
from ..files.folder.side_files import CARD
from ..files.hub.cache import import_download
from ..files.hub.names import HubName
from ..files.output.paths import find_foreign_file, is_weights_of_ours
from ..files.stores.links import StoreLink
from ..files.stores.objects import forget_link, open_store, store_of
from ..files.stores.outgoing import CONTAINER_ENDS, Outgoing
from ..streaming.ranks import RankDone, current_job
from .calls import Call

R = TypeVar("R")

ALONE = ("apply",)  # whose ranks need one folder for the output


def sent_to_store(call: Call[R], link: StoreLink, work: Callable[[Call[R]], R]) -> R:
    """Run a command, and send its output to a store; each rank of a job sends its part from its own folder.

    Nothing of the output is in the store until all of it is right. If the run dies, the parts that were sent stay for
    `resume`, and what it needs for that is in the cache.

    Raises:
        UsageError: the output cannot go to a store, or would replace other files than a model's.
        NeedsFlag: there is an output of this name.
        RankDone: on ranks other than 0.
    """
    options: Any = call
    link = StoreLink(link.scheme, link.text.rstrip("/"))
    job = current_job()
    _require_writable(link)
    _require_no_statement(options, str(link))
    if job.count > 1 and call.name() in ALONE:
        _refuse_ranks(f"{call.name()} to a store", str(link))
    folder = _folder_of(link.text, job.rank)
    is_dry = bool(getattr(options, "dry_run", False))
    resume = bool(getattr(options, "resume", False)) or job.restarts > 0
    place = folder / ("dry" if is_dry else "output")
    with locked(folder, Path(str(link)), lambda: disk.make_folder(folder)):
        disk.make_folder(place)
        outgoing = Outgoing(link, place)
        may_replace = bool(getattr(options, "force", False)) or is_dry or (resume and outgoing.was_finishing)
        replaced = [] if job.rank else outgoing.existing(may_replace)
        if replaced and (foreign := _foreign(link)):
            what = f"holds {foreign}; --force replaces a model's files and nothing else"
            raise UsageError(what, culprit=str(link), remedy="name another output with -o")
        outgoing.clear(resume)
        if not (job.rank or is_dry):
            outgoing.remove_records()
        show_as(f"{place}{os.sep}", str(link).rpartition("/")[0] + "/")
        elsewhere.opened.clear()

        def give_up() -> None:
            job.give_up()
            outgoing.abort()
            if job.count > 1 and not job.rank:
                with suppress(InputError, MachineError):  # the first error is the one to report
                    outgoing.remove_records()
            disk.remove_folder(place)

        def with_others() -> None:
            """Wait for the other ranks, whose objects appear before those that name them."""
            if job.count > 1:
                job.barrier("sent")
                outgoing.remove_records()
                job.barrier("appeared")

        with unless_done(give_up, lambda: "" if job.has_given_up() else outgoing.stays()):
            with suppress(RankDone):
                report = work(replace(options, out=outgoing.path))
            if job.rank:
                outgoing.finish_part(lambda: job.barrier("sent"))
                job.barrier("appeared")
            elif not is_dry:
                digest = getattr(report, "digests", {}).get(getattr(report, "out", None))
                outgoing.finish(replaced, digest, with_others)
        forget_link(link)
        disk.remove_folder(place)
        with suppress(OSError):
            disk.remove_empty_folder(folder)
    job.exit_unless_rank0()
    return _with_links(report)


def sent_to_hub(call: Call[R], name: HubName, work: Callable[[Call[R]], R]) -> R:
    """Run a command, and commit its output to a repository on the hub.

    Raises:
        UsageError: the output cannot go there.
        NeedsFlag: files are there.
        InputError, MachineError: the hub refuses it, or was not reached. Nothing is committed then.
    """
    options: Any = call
    _require_no_statement(options, str(name))
    if current_job().count > 1:
        _refuse_ranks("an output on the hub", str(name))
    path = PurePosixPath(name.path)
    is_file = path.suffix in CONTAINER_ENDS
    root = replace(name, path=str(path.parent).removeprefix(".")) if is_file else name
    target = import_download(name, ".upload").HubTarget(root)
    is_dry, force = bool(getattr(options, "dry_run", False)), bool(getattr(options, "force", False))
    link = f"hf://{str(name).removeprefix('hf://')}"
    kept = [file for file in target.files if file != CARD and not file.startswith(".")]
    kept = [file for file in kept if file in (path.name, path.with_suffix(".undo").name)] if is_file else kept
    if kept and not force and not is_dry:
        raise NeedsFlag("exists already", culprit=link, flags="--force", why="to replace it, or name another with -o")
    folder = _folder_of(link)
    place = folder / Path(name.path or name.repo).name
    with locked(folder, Path(link), lambda: disk.make_folder(folder)):
        if not getattr(options, "resume", False):
            _empty(folder)
        show_as(str(place), link)
        with unless_done(partial(_empty, folder, "complete"), partial(what_stays, place)):
            report = work(replace(options, out=place))
            if not is_dry:
                source = folder if is_file else place
                built = {each.relative_to(source).as_posix(): each for each in source.rglob("*") if each.is_file()}
                if CARD in target.files and not force:
                    built.pop(CARD, None)
                _send(target, built, kept.__contains__ if is_file else is_weights_of_ours, call.name(), place)
        disk.remove_folder(folder)
    return _with_links(report)


def _send(target: Any, built: Mapping[str, Path], replaced: Callable[[str], bool], command: str, place: Path) -> None:
    """Commit files to the hub; if that fails, keep them, as they may have taken hours."""
    try:
        target.send(built, replaced, f"loratool {command}")
    except (InputError, MachineError) as error:
        complete = place.with_name("complete")
        disk.rename(place, complete)
        remedy = f"it is complete here, to be sent with: hf upload {target.name.repo} {shell_word(complete)}"
        error.remedy = f"{remedy} {shell_word(target.name.path)}" if target.name.path else remedy
        raise


def _empty(folder: Path, stays: str = "") -> None:
    for place in folder.iterdir():
        if place.name != stays:
            disk.remove_folder(place) if place.is_dir() else disk.unlink(place)


def _require_no_statement(options: Any, link: str) -> None:
    if getattr(options, "attest", None) is not None:
        remedy = "write the output to a folder here, and copy it"
        raise UsageError("a statement needs the files of the output", culprit=link, remedy=remedy)


def _refuse_ranks(what: str, link: str) -> NoReturn:
    remedy = "run it without torchrun, or write to a folder that all nodes share"
    raise UsageError(f"{what} is for one process", culprit=link, remedy=remedy)


def _require_writable(link: StoreLink) -> None:
    """Raise UsageError for a link under which no object can be written."""
    if store_of(link).upload is None:
        remedy = "name a folder here with -o, or a link to an object store"
        raise UsageError("is a page of a web server, where nothing can be written", culprit=str(link), remedy=remedy)
    if link.text.count("/") < 3:
        raise UsageError("is a bucket, and not a place in one", culprit=str(link), remedy=f"name {link}/merged")


def _foreign(link: StoreLink) -> str | None:
    folder = open_store(link)
    return find_foreign_file(folder, (), {}) if folder.is_dir() else None


def outgoing_folder() -> Path:
    """Return the folder of outputs that are on their way to a store."""
    return Path(os.path.expanduser(os.getenv("XDG_CACHE_HOME") or "~/.cache"), "loratool", "outgoing")


def _folder_of(link: str, rank: int = 0) -> Path:
    """Return the folder of the cache for a rank's part of an output, the same for each run of it."""
    return Path(outgoing_folder(), hashlib.sha256(link.encode()).hexdigest()[:16] + (f"-{rank}" if rank else ""))


def _with_links(report: R) -> R:
    """Return a report whose paths in the cache are the links of what was sent."""
    value: Any = report
    found = {each.name: getattr(value, each.name) for each in fields(value)}
    changed: dict[str, Any] = {name: without_credentials(text) for name, text in found.items() if isinstance(text, str)}
    if found.get("digests"):
        changed["digests"] = {without_credentials(path): digest for path, digest in found["digests"].items()}
    shown: R = replace(value, **changed)
    return shown
