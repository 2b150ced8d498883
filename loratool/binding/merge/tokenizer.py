"""Choose the tokenizer of a merged model's folder: the base's, the one beside an adapter, or another folder's.

A trainer saves its tokenizer beside the adapter. That tokenizer is taken if the adapter changes rows of the vocabulary,
because it numbers these rows. Otherwise the base's stays, unless the user chooses another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import InputError, UsageError
from ...files.folder.side_files import is_copy, is_vocabulary, side_kind, tokenizer_files
from ..ties.ties import find_tie, vocabulary_names
from .choices import TOKENIZERS
from .merge_plan import MergePlan

Files = Mapping[str, Path]  # name of a file -> its path


def choose_tokenizer(plan: MergePlan, choice: str | os.PathLike[str] | None, is_file: bool) -> MergePlan:
    """Return the plan with the files of the chosen tokenizer, and a note if there was a choice.

    A tokenizer replaces the base's completely: other tokenizer files of the base are not copied, because they would be
    read together. A tokenizer without a vocabulary (only added tokens or a chat template) is added to the base's.

    Args:
        choice: a key of TOKENIZERS or a folder; None takes the adapter's if it changes the vocabulary.
        is_file: whether the output is a single file.

    Raises:
        UsageError: the output has no place for a tokenizer, or several adapters have one.
        InputError: the chosen place has no tokenizer, or it cannot be read.
    """
    base = plan.base
    if is_file or base.parts or base.is_gguf or not base.has_side_files:
        if choice is None:
            return plan
        what = "a pipeline" if base.parts else "a GGUF model" if base.is_gguf else "a single file"
        raise UsageError(f"{what} has no tokenizer beside its weights", remedy="leave out --tokenizer")
    base_files = tokenizer_files(base.folder)
    if choice is not None and choice not in TOKENIZERS:
        chosen = tokenizer_files(Path(choice))
        if not chosen:
            raise InputError("has no tokenizer's files", culprit=os.fspath(choice))
        return _with_files(plan, base_files, chosen, (f"tokenizer: that of {os.fspath(choice)}",))
    beside = {folder: tokenizer_files(folder) for folder in _folders(plan)}
    others = _others(beside, base_files)
    if choice == "adapter":
        if not any(beside.values()):
            names = ", ".join(adapter.name for adapter, _ in plan.adapters)
            raise InputError("has no tokenizer beside it", culprit=names)
        if len(others) > 1:
            raise UsageError(
                f"several adapters have a tokenizer beside them: {', '.join(map(str, others))}",
                remedy="name the folder of one with --tokenizer",
            )
    changing = _folders_that_change_words(plan)
    fitting = {
        folder: files
        for folder, files in others.items()
        if choice == "adapter" or (folder in changing and "tokenizer" in map(side_kind, files))
    }
    if choice == "base" or len(fitting) != 1:
        notes = _note_of_the_base(others, fitting) if others else _note_of_none(plan, beside)
        return replace(plan, notes=(*plan.notes, *notes))
    [(folder, files)] = fitting.items()
    why = ", which --tokenizer base leaves out" if choice is None else ""
    return _with_files(plan, base_files, files, (f"tokenizer: that of {folder}{why}",))


def _with_files(plan: MergePlan, base_files: Files, chosen: Files, notes: tuple[str, ...]) -> MergePlan:
    """Return the plan with a tokenizer's files instead of the base's; equal files are unchanged."""
    stale = [name for name in base_files if name not in chosen] if any(map(is_vocabulary, chosen)) else []
    skipped = dict.fromkeys(stale, "of the base's tokenizer, which another one replaces")
    other = {name: path for name, path in chosen.items() if not _adds_nothing({name: path}, base_files)}
    edits = replace(
        plan.edits, files={**plan.edits.files, **other}, skipped_files={**plan.edits.skipped_files, **skipped}
    )
    return replace(plan, edits=edits, notes=(*plan.notes, *notes))


def _folders(plan: MergePlan) -> list[Path]:
    """Return the folders of the adapters."""
    return list(dict.fromkeys(adapter.file.path.parent for adapter, _ in plan.adapters))


def _others(beside: Mapping[Path, Files], base_files: Files) -> dict[Path, Files]:
    """Return the tokenizers that differ from the base's, and of equal ones only the first."""
    others: dict[Path, Files] = {}
    for folder, files in beside.items():
        is_known = any(files.keys() == each.keys() and _adds_nothing(files, each) for each in others.values())
        if not is_known and not _adds_nothing(files, base_files):
            others[folder] = files
    return others


def _adds_nothing(files: Files, base_files: Files) -> bool:
    """Return whether each file is also in `base_files`, byte for byte."""
    return all(name in base_files and is_copy(path, base_files[name]) for name, path in files.items())


def _folders_that_change_words(plan: MergePlan) -> set[Path]:
    """Return the folders of the adapters that change rows of a token embedding or of the head."""
    words = vocabulary_names(plan.base, find_tie(plan.base))
    return {p.adapter.file.path.parent for name in words for p in plan.requested.get(name, ())}


def _note_of_the_base(others: Mapping[Path, Files], fitting: Mapping[Path, Files]) -> Sequence[str]:
    """Return a note that the base's tokenizer stays although there is another."""
    folders, verb = ", ".join(map(str, fitting or others)), "have" if len(fitting or others) > 1 else "has"
    what = " and ".join(dict.fromkeys(side_kind(name) or "" for files in others.values() for name in files))
    how = "--tokenizer FOLDER" if len(fitting or others) > 1 else "--tokenizer adapter"
    return (f"tokenizer: the base's; {folders} {verb} another {what}, which {how} takes",)


def _note_of_none(plan: MergePlan, beside: Mapping[Path, Files]) -> Sequence[str]:
    """Return a note that no adapter has the tokenizer for its new vocabulary."""
    specs, edited = plan.base.specs, plan.edits.specs
    words = vocabulary_names(plan.base, find_tie(plan.base))
    rows = {edited[name].shape[0] for name in words if name in edited and name in specs}
    rows -= {specs[name].shape[0] for name in words if name in specs}
    if not rows or any(beside.values()):
        return ()
    return (f"tokenizer: the base's, though the vocabulary has {max(rows):,} rows now: no adapter has one beside it",)
