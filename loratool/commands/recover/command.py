"""End a change in place whose process died, forward or back."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from ...durable.in_place import ModelInPlace, own_path
from ...errors import InputError
from ...streaming.rewrite import RESULTS
from ...views.parts.writing import command_line
from ...views.recover import RecoverReport
from ..apply.call import Apply
from ..apply.in_place import prepare_apply
from ..calls import Call
from ..in_place import PlannedChange, call_of, end_back, end_forward, recall, refuse_store
from ..merge.call import Merge
from ..merge.in_place import prepare_merge
from ..unmerge.call import Unmerge
from ..unmerge.in_place import prepare_unmerge
from .call import Recover

Prepare = Callable[[Any, ModelInPlace], AbstractContextManager[PlannedChange[Any]]]

# The name of a command that changes a model in place -> its call, and what plans its change
CHANGES: dict[str, tuple[type[Call[Any]], Prepare]] = {
    "merge": (Merge, prepare_merge),
    "unmerge": (Unmerge, prepare_unmerge),
    "apply": (Apply, prepare_apply),
}


def run_recover(call: Recover) -> RecoverReport:
    """End a change in place that was interrupted."""
    path = own_path(call.model)
    model = ModelInPlace(path, RESULTS)
    if not os.path.isdir(model.folder):
        refuse_store(path)
        what = "is in the middle of no change in place" if os.path.lexists(path) else "is no file or folder here"
        raise InputError(what, culprit=str(path), remedy="there is nothing to recover")
    with model.locked():
        remembered = call_of(model)
        model.open()
        if not model.is_changing:
            return _leftovers(call, path, model, remembered.get("command", ""))
        kind, prepare = CHANGES[remembered["command"]]
        done = len(model.windows)
        if not call.dry_run:
            prepared = partial(prepare, recall(kind, remembered, path))
            if call.back:
                end_back(model, prepared)
            else:
                end_forward(model, prepared, call.progress)
        return RecoverReport(
            model=str(path),
            command=remembered["command"],
            windows=done,
            dry_run=call.dry_run,
            is_new=not call.back,
        )


def _leftovers(call: Recover, path: Path, model: ModelInPlace, command: str) -> RecoverReport:
    """Remove what is left beside a model that is at its place."""
    is_new = model.is_new
    if not call.dry_run:
        model.end()
    if is_new and call.back:
        verb, *back = {"merge": ["unmerge"], "unmerge": ["merge"]}.get(command, ["apply", "--reverse"])
        how = command_line(verb, path, "...", "--in-place", *back)
        what = "is changed already: its process died when only the journal was left to remove"
        raise InputError(what, culprit=str(path), remedy=f"go back with {how}")
    return RecoverReport(model=str(path), command=command, windows=0, dry_run=call.dry_run, is_new=is_new)
