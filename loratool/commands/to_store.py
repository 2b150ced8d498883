"""Run a command whose output goes to a store: it writes into a folder of the cache, from which the parts are sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..durable import disk, elsewhere
from ..durable.interrupts import unless_done
from ..durable.locks import locked
from ..errors import UsageError, show_as, without_credentials
from ..files.output.paths import find_foreign_file
from ..files.stores.links import StoreLink
from ..files.stores.objects import open_store
from ..files.stores.outgoing import Outgoing
from ..streaming.ranks import current_job
from .calls import Call

R = TypeVar("R")


def sent_to_store(call: Call[R], link: StoreLink, work: Callable[[Call[R]], R]) -> R:
    """Run a command, and send its output to a store.

    Nothing of the output is in the store until all of it is right. If the run dies, the parts that were sent stay for
    `resume`, and what it needs for that is in the cache.

    Raises:
        UsageError: the output cannot go to a store, or would replace other files than a model's.
        NeedsFlag: there is an output of this name.
    """
    options: Any = call
    if getattr(options, "attest", None) is not None:
        remedy = "write the output to a folder here, and copy it"
        raise UsageError("a statement needs the files of the output", culprit=str(link), remedy=remedy)
    if current_job().count > 1:
        remedy = "run it as one process, or write to a folder that all nodes share"
        raise UsageError("several ranks do not write to a store", culprit=str(link), remedy=remedy)
    folder = _folder_of(link)
    place, resume = folder / "output", bool(getattr(options, "resume", False))
    with locked(folder, Path(str(link)), lambda: disk.make_folder(folder)):
        if place.exists() and not resume:
            Outgoing(link, place).forget()
            disk.remove_folder(place)
        disk.make_folder(place)
        outgoing = Outgoing(link, place)
        show_as(f"{place}{os.sep}", str(link).rpartition("/")[0] + "/")
        is_dry = bool(getattr(options, "dry_run", False))
        replaced = outgoing.existing(bool(getattr(options, "force", False)) or is_dry)
        if replaced and (foreign := _foreign(link)):
            what = f"holds {foreign}; --force replaces a model's files and nothing else"
            raise UsageError(what, culprit=str(link), remedy="name another output with -o")
        elsewhere.opened.clear()

        def give_up() -> None:
            outgoing.abort()
            disk.remove_folder(place)

        with unless_done(give_up, outgoing.stays):
            report = work(replace(options, out=outgoing.path))
            if not is_dry:
                outgoing.finish(replaced, getattr(report, "digests", {}).get(getattr(report, "out", None)))
        disk.remove_folder(place)
        disk.remove_empty_folder(folder)
    return _with_links(report)


def _foreign(link: StoreLink) -> str | None:
    folder = open_store(link)
    return find_foreign_file(folder, (), {}) if folder.is_dir() else None


def _folder_of(link: StoreLink) -> Path:
    """Return the folder of the cache for an output, the same for each run of it."""
    cache = os.path.expanduser(os.getenv("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache, "loratool", "outgoing", hashlib.sha256(link.text.encode()).hexdigest()[:16])


def _with_links(report: R) -> R:
    """Return a report whose paths in the cache are the links of what was sent."""
    value: Any = report
    found = {each.name: getattr(value, each.name) for each in fields(value)}
    changed: dict[str, Any] = {name: without_credentials(text) for name, text in found.items() if isinstance(text, str)}
    if found.get("digests"):
        changed["digests"] = {without_credentials(path): digest for path, digest in found["digests"].items()}
    shown: R = replace(value, **changed)
    return shown
