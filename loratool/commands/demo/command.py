"""Run the command `demo`: write the files that the guides use, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ...durable import disk
from ...durable.fileio import lacking_space, write_file
from ...durable.partial import partial_folder, set_aside
from ...errors import MachineError, NeedsFlag, UsageError
from ...files.output.output import naming_output
from ...files.output.paths import check_place
from ...views.demo import DemoPart, DemoReport
from .call import Demo
from .files import PARTS, demo_files

NOTE = "README.md"  # its first line marks the folder as ours

TITLE = "# Files of `loratool demo`"

OTHER_FOLDER = "choose another folder"


def run_demo(call: Demo) -> DemoReport:
    """Write the demo's models and adapters into a folder."""
    path = Path(call.folder)
    check_place(path, False, "demo", OTHER_FOLDER, option="")
    contents = demo_files(path.as_posix())
    contents[NOTE] = _note().encode()
    exists = _check_former(path, contents, call.force, call.dry_run)
    nbytes = sum(map(len, contents.values()))
    if not call.dry_run:
        if lack := lacking_space(path.absolute().parent, nbytes):
            raise MachineError(lack, culprit=str(path), remedy=f"free some space, or {OTHER_FOLDER}")
        with naming_output(path), partial_folder(path) as folder:
            for name, data in contents.items():
                disk.make_folder((folder / name).parent)
                write_file(folder / name, data)
    parts = tuple(
        DemoPart(part, what, sum(len(data) for name, data in contents.items() if f"{name}/".startswith(f"{part}/")))
        for part, what in PARTS.items()
    )
    return DemoReport(os.fspath(call.folder), call.dry_run, nbytes, parts, exists=exists)


def _note() -> str:
    """Return the text that is beside the files."""
    rows = "".join(f"- `{part}`: {what}\n" for part, what in PARTS.items())
    return f"{TITLE}\n\nThe weights are random; the guides use these files (`loratool guide`).\n\n{rows}"


def _check_former(path: Path, contents: Mapping[str, bytes], force: bool, dry_run: bool) -> bool:
    """Refuse a folder that holds other files; return whether a dry run found one that only --force replaces.

    Raises:
        UsageError: the folder is not that of an earlier demo, or has more files.
        NeedsFlag: it is, and `force` is false.
    """
    place = set_aside(path) or path
    if not os.path.lexists(place) or not any(place.iterdir()):
        return False
    note = place / NOTE
    ours = note.is_file() and note.read_bytes()[: len(TITLE)] == TITLE.encode()
    for entry in sorted(place.rglob("*")):
        name = entry.relative_to(place).as_posix()
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and any(entry.iterdir()):
            continue
        if not ours or is_folder or entry.is_symlink() or name not in contents:
            what = f"holds {name}; --force only replaces files of a demo"
            raise UsageError(what, culprit=str(path), remedy=OTHER_FOLDER)
    if not force and not dry_run:
        raise NeedsFlag("exists already", culprit=str(path), flags="--force", why=f"to replace it, or {OTHER_FOLDER}")
    return not force
