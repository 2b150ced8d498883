"""Two checkpoints of one model side by side: which tensors are the same one, and what lies between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..architectures.renames import canonical
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.tensor_ref import TensorRef
from .resolve import strip_wrappers


@dataclass(frozen=True)
class ModelPairs:
    """both: a base's name -> the tensor on either side; the others have no partner."""

    both: dict[str, tuple[TensorRef, TensorRef]]
    only_base: tuple[str, ...]
    only_tuned: dict[str, TensorRef]


def pair_tensors(base: Checkpoint, tuned: Checkpoint) -> ModelPairs:
    """The tensors of both sides by the base's name, whatever their shards, wrappers, containers and transformers'
    version.

    Raises InputError where nothing has a partner.
    """
    types = base.model_types or tuned.model_types
    mine, theirs = (_by_path(side.specs, types) for side in (base, tuned))
    prefix = missing_prefix(set(mine), set(theirs), {path.split(".")[0] + "." for path in {*mine, *theirs}})
    if prefix is not None:
        longer, shorter = prefix
        theirs = {longer + path.removeprefix(shorter): name for path, name in theirs.items()}
    both = {
        name: (TensorRef(base.shard_of[name], name), TensorRef(tuned.shard_of[theirs[path]], theirs[path]))
        for path, name in mine.items()
        if path in theirs
    }
    if not both:
        raise InputError("no tensor of one side has a name of the other", remedy="are these two of one family?")
    return ModelPairs(
        both,
        tuple(name for path, name in mine.items() if path not in theirs),
        {name: TensorRef(tuned.shard_of[name], name) for path, name in theirs.items() if path not in mine},
    )


def _by_path(names: Iterable[str], types: Collection[str]) -> dict[str, str]:
    """Names by their paths in transformers 5; of two with one path one stands under its own name."""
    paths = {name: canonical(strip_wrappers(name), types) for name in names}
    owner = {path: path if path in paths else name for name, path in paths.items()}
    return {path if owner[path] == name else name: name for name, path in paths.items()}


def missing_prefix(mine: set[str], theirs: set[str], heads: Iterable[str]) -> tuple[str, str] | None:
    """(what to put before the names of `theirs`, what to take off), one of `heads` or nothing, where that makes them
    those of `mine`.
    """
    if len(mine & theirs) * 2 >= min(len(mine), len(theirs)):
        return None
    either = sorted({"", *heads})  # sorted: of equals always the same
    found = [(a, b) for a in either for b in either if a != b]
    best = max(found, key=lambda ab: len(mine & {ab[0] + p.removeprefix(ab[1]) for p in theirs}), default=None)
    if best is None or not mine & {best[0] + p.removeprefix(best[1]) for p in theirs}:
        return None
    return best
