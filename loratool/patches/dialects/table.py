"""The dialects: a row for each, those that are only named and refused too; open, describe and write by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ...durable.fileio import reading
from ...errors import InputError, UsageError, brief, shell_word
from ...files.containers.file_kinds import first_bytes, is_text
from ...files.folder.weight_changes import find_change
from . import disk_delta, skyrl, trl
from .disk_delta import open_disk_delta, write_disk_delta
from .fireworks import is_arc3, open_fireworks, refuse_arc3, write_fireworks
from .patch import ForeignDialect, ForeignPatch, TensorPair, WrittenPatch
from .prime_rl import ENTRY, open_prime_rl, write_prime_rl
from .skyrl import open_skyrl, write_skyrl
from .trl import open_trl, write_trl


def _is(key: str) -> Callable[[Path], bool]:
    """Return the recognizer of a dialect that `weight_changes` knows: models of it are refused by the same marks."""

    def recognize(path: Path) -> bool:
        found = find_change(path)
        return found is not None and found.key == key

    return recognize


def _begins(mark: bytes, name: str = "(?!)") -> Callable[[Path], bool]:
    """Return the recognizer of a file by its first bytes, or by its name."""

    def recognize(path: Path) -> bool:
        if not path.is_file():
            return False
        first = first_bytes(path)
        return bool(re.fullmatch(name, path.name)) or (first.startswith(mark) and not is_text(first))

    return recognize


def _refuse(what: str, remedy: str, path: Path) -> NoReturn:
    raise InputError(f"is {what}", culprit=str(path), remedy=remedy)


REMAKE = "restore the changed model with the program that wrote it, and make a patch: loratool patch BASE TUNED -o P"

DIALECTS: dict[str, ForeignDialect] = {
    each.key: each
    for each in (
        ForeignDialect(
            "disk-delta",
            "a disk delta of slime, miles or SGLang",
            _is("disk-delta"),
            open_disk_delta,
            write_disk_delta,
            disk_delta.ENTRY,
        ),
        ForeignDialect("skyrl", "a delta of SkyRL", _is("skyrl"), open_skyrl, write_skyrl, skyrl.ENTRY),
        ForeignDialect(
            "arc_v3",
            "a patch of Fireworks in arc_v3",
            lambda path: _is("fireworks")(path) and is_arc3(path),
            refuse_arc3,
        ),
        ForeignDialect(
            "arc_v2", "a patch of Fireworks, arc_v1 or arc_v2", _is("fireworks"), open_fireworks, write_fireworks
        ),
        ForeignDialect(
            "prime-rl", "a sparse update of prime-rl", _is("prime-rl"), open_prime_rl, write_prime_rl, ENTRY
        ),
        ForeignDialect("trl", "a sparse patch of TRL", _is("trl"), open_trl, write_trl, trl.ENTRY),
        ForeignDialect(
            "reminis",
            "a database of reminis",
            _begins(b"SQLite format 3\0"),
            partial(
                _refuse,
                "an SQLite database, as reminis has models and patches; some of its patches give other bytes on "
                "another machine",
                REMAKE,
            ),
        ),
        ForeignDialect(
            "deltatensors",
            "a patch of deltatensors",
            _begins(b"wdelta\0"),
            partial(_refuse, "a patch of deltatensors, which is lossy: int4 and outliers", REMAKE),
        ),
        ForeignDialect(
            "zipnn",
            "a file of ZipNN",
            _begins(b"ZN", r".*\.znn"),
            partial(
                _refuse,
                "compressed by ZipNN, a whole model without a base",
                "decompress it with zipnn, and name the model",
            ),
        ),
    )
}


def find_dialect(path: Path) -> ForeignDialect | None:
    """Return the dialect of a file or folder, from headers and JSON; None if it is no patch of another program."""
    with reading(path):
        for dialect in DIALECTS.values():
            with suppress(InputError):  # what cannot be read is of none
                if dialect.recognize(path):
                    return dialect
    return None


def open_foreign_patch(path: Path) -> ForeignPatch:
    """Open a patch of another program.

    Raises:
        InputError: it is none, it is damaged, or its dialect is not read, and why.
    """
    dialect = find_dialect(path)
    if dialect is None:
        known = ", ".join(key for key, each in DIALECTS.items() if each.write)
        raise InputError(f"is no patch of a known kind ({known})", culprit=str(path))
    with reading(path):
        return dialect.open(path)


def describe_patch(path: Path) -> str:
    """Return what a patch of another program is and how it is applied, for a message after "is".

    Raises:
        InputError: as `open_foreign_patch`.
    """
    with closing(open_foreign_patch(path)) as patch:
        count = len(patch.changes)
        tensors = f"{count} tensor{'' if count == 1 else 's'}"
        base = "" if patch.base_version is None else f" against version {patch.base_version}"
        how = f"{patch.dialect}: {', '.join(patch.how)}"
        command = f"loratool apply BASE {shell_word(path)} -o OUT"
        return f"a delta of {tensors}{base} ({how}), no model: `{command}`"


def write_foreign_patch(dialect: str, pairs: Iterable[TensorPair], out: Path, **options: Any) -> WrittenPatch:
    """Write a patch in a dialect, complete or not at all.

    Args:
        dialect: a key of DIALECTS that is written.
        pairs: the tensors of both models, in the order of the target's files; a dialect leaves out what is the same.
        options: those of the dialect's function.

    Raises:
        InputError: the dialect cannot say the change of a tensor.
        UsageError: no such dialect is written.
    """
    row = DIALECTS.get(dialect)
    if row is None or row.write is None:
        known = ", ".join(key for key, each in DIALECTS.items() if each.write)
        raise UsageError(f"{brief(dialect)} is none of {known}", culprit="--to")
    return row.write(pairs, out, **options)
