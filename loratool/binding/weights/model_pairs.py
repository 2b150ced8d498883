"""Pair the tensors of two checkpoints of one model, which may have different names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ...architectures.renames import canonical
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.tensor_ref import TensorRef
from ..modules.resolve import strip_wrappers


@dataclass(frozen=True)
class ModelPairs:
    """The tensors of two checkpoints, paired."""

    both: dict[str, tuple[TensorRef, TensorRef]]  # the base's name -> the tensor on either side
    only_base: tuple[str, ...]  # the base's names
    only_tuned: dict[str, TensorRef]  # path -> the tensor


def pair_tensors(base: Checkpoint, tuned: Checkpoint) -> ModelPairs:
    """Pair the tensors of both sides, across shards, wrappers, containers and versions of transformers.

    Raises:
        InputError: no tensor has a partner.
    """
    types = base.model_types or tuned.model_types
    mine, theirs = (_by_path(side.specs, types) for side in (base, tuned))
    prefix = missing_prefix(set(mine), set(theirs), {path.split(".")[0] + "." for path in {*mine, *theirs}})
    if prefix is not None:
        longer, shorter = prefix
        theirs = {longer + path.removeprefix(shorter): name for path, name in theirs.items()}
    both = {name: (base.ref(name), tuned.ref(theirs[path])) for path, name in mine.items() if path in theirs}
    if not both:
        raise InputError("no tensor of one side has a name of the other", remedy="are these two of one family?")
    return ModelPairs(
        both,
        tuple(name for path, name in mine.items() if path not in theirs),
        {name: tuned.ref(name) for path, name in theirs.items() if path not in mine},
    )


def _by_path(names: Iterable[str], types: Collection[str]) -> dict[str, str]:
    """Return path in transformers 5 -> name; if two names have one path, one of them keeps its name as path."""
    paths = {name: canonical(strip_wrappers(name), types) for name in names}
    owner = {path: path if path in paths else name for name, path in paths.items()}
    return {path if owner[path] == name else name: name for name, path in paths.items()}


def missing_prefix(mine: set[str], theirs: set[str], prefixes: Iterable[str]) -> tuple[str, str] | None:
    """Find the prefixes in which two sets of names differ, unless half of the names are already the same.

    Args:
        prefixes: the prefixes to try, besides the empty one.

    Returns:
        (the prefix to add to the names of `theirs`, the prefix to remove first) with which most of them are in `mine`;
        None if no change of prefixes is needed or helps.
    """
    if len(mine & theirs) * 2 >= min(len(mine), len(theirs)):
        return None
    either = sorted({"", *prefixes})  # sorted, so that the result for a tie is the same in every run
    pairs = [(a, b) for a in either for b in either if a != b]
    best = max(pairs, key=lambda ab: len(mine & {ab[0] + p.removeprefix(ab[1]) for p in theirs}), default=None)
    if best is None or not mine & {best[0] + p.removeprefix(best[1]) for p in theirs}:
        return None
    return best
