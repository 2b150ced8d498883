"""Put patches one after the other: what a chain of them makes of a model, read in one pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.hub.cache import place_named
from .patch_file import PatchFile, SideFile
from .side import read_side_file, side_names
from .sources import ModelSource, PatchedSource, TensorSource, is_made
from .spans import TensorSpan, digest_of_spans

Reads = dict[str, Callable[[], bytes]]  # a side file -> what reads it


class PatchChain:
    """Patches that are applied to a model, or taken off it.

    Args:
        with_adapters: returns the model with the adapters of a patch merged.
        is_old: the model's spans are those that the chain begins with, as far as they will be read.

    Attributes:
        patches: in their order.
        source: the model that they make.
        files: its files.
        digest: its digest.
        reached: how many of the patches the model that was given has behind it.

    Raises:
        InputError: a patch is damaged, does not follow from the one before, or is not of this model.
    """

    def __init__(
        self,
        base: Checkpoint,
        name: str,
        paths: Sequence[str],
        with_adapters: Callable[[PatchFile], TensorSource],
        back: bool = False,
        is_old: bool = False,
    ) -> None:
        self.patches: list[PatchFile] = []
        try:
            for path in paths:
                place = place_named(path)
                if place.is_dir():
                    what, remedy = "is a folder, and no patch", "name a patch; a folder of versions needs --step N"
                    raise InputError(what, culprit=path, remedy=remedy)
                self.patches.append(PatchFile(place))
            _require_links(self.patches)
            steps = [*reversed(self.patches)] if back else self.patches
            first: TensorSource = ModelSource(base)
            self._side: Reads = {each: partial(read_side_file, base, each) for each in side_names(base)}
            made = list[PatchedSource]()
            hashes = dict[TensorSpan, bytes]()
            self.reached = reached = 0 if is_old else _count_made(first, steps, back, hashes)
            for number, patch in enumerate(steps[max(0, reached - 1) :]):
                is_there = bool(reached) and not number
                if patch.adapters and not (back or is_there):
                    if made:
                        what = "has adapters, which can be merged into a model on disk only"
                        remedy = "apply the patches before it first, and this one to their output"
                        raise InputError(what, culprit=str(patch.path), remedy=remedy)
                    first = with_adapters(patch)
                made.append(PatchedSource(first, name, patch, back, is_there))
                if not (number or reached or patch.adapters):
                    made[0].require_base(hashes)
                first = made[-1]
                self._side = _side_after(self._side, patch, back, name)
        except BaseException:
            self.close()
            raise
        self._first, self.source, self._is_there = made[0], made[-1], bool(reached)
        self.files, self.last = self.source.files, steps[-1]
        self.digest = self.last.base_digest if back else self.last.digest

    def side(self) -> dict[str, bytes]:
        """Return the side files of the model that the chain makes.

        Raises:
            InputError: one is needed from beside the base, and is another or missing.
        """
        return {name: read() for name, read in self._side.items()}

    def given_digest(self) -> str | None:
        """Return the digest of the model that was given, once all spans were made; None if not all of it was read."""
        first = self._first
        spans, found = first.given_spans, first.read_hashes
        if len(found) < len(spans) or not first.reads_all:
            return None
        return digest_of_spans(first.given_specs, spans, [found[number] for number in range(len(spans))])

    def is_done(self) -> bool:
        """Return whether the model that was given was what the first patch makes, after all spans were made."""
        changing = {number for number, row in enumerate(self._first.patch.rows) if row.hash != row.source_hash}
        return (self._is_there or bool(self._first.kept)) and changing <= self._first.kept

    def close(self) -> None:
        for patch in self.patches:
            patch.close()


def _count_made(model: TensorSource, steps: Sequence[PatchFile], back: bool, hashes: dict[TensorSpan, bytes]) -> int:
    """Return how many patches a model has behind it already; `hashes` are as in `is_made`."""
    return next((n for n in range(len(steps), 0, -1) if is_made(model, steps[n - 1], back, hashes)), 0)


def _require_links(patches: Sequence[PatchFile]) -> None:
    """Raise InputError unless each patch begins where the one before ends, and none leads back to an earlier model."""
    for before, after in pairwise(patches):
        if before.digest != after.base_digest:
            maker = next((each for each in patches if each.digest == after.base_digest), None)
            taker = next((each for each in patches if each.base_digest == after.digest), None)
            remedy = f"give it before {taker.path}" if taker else "give the patches between them too"
            remedy = f"give it after {maker.path}" if maker else remedy
            what = f"does not begin where {before.path} ends: it is of the model {after.base_digest[:16]}..., not "
            raise InputError(f"{what}{before.digest[:16]}...", culprit=str(after.path), remedy=remedy)
    passed = [patches[0].base_digest]
    for patch in patches:
        if patch.digest in passed[:-1]:
            what = f"leads back to a model that the chain has been at, {patch.digest[:16]}..."
            raise InputError(what, culprit=str(patch.path), remedy="give the patches from one model to another alone")
        passed += [patch.digest] if patch.digest != passed[-1] else []


def _side_after(before: Reads, patch: PatchFile, back: bool, name: str) -> Reads:
    """Return what reads the side files of the model that a patch makes."""
    wanted: Mapping[str, SideFile] = patch.side
    if back:
        wanted = {each: entry for each, entry in wanted.items() if entry.content is None} | patch.base_side
    return {
        each: partial(_known, before.get(each), patch, entry, os.path.join(name, each))
        if entry.content is None
        else partial(bytes, entry.content)
        for each, entry in wanted.items()
    }


def _known(read: Callable[[], bytes] | None, patch: PatchFile, entry: SideFile, path: str) -> bytes:
    """Read a side file that a patch knows only by its hash."""
    data = read() if read else None
    if data is None or SideFile.of(data, known=True).sha256 != entry.sha256:
        is_now = "missing" if data is None else "another file"
        what = f"is needed as it was when {patch.path} was made, and is {is_now}"
        raise InputError(what, culprit=path, remedy="give the whole model that the patch is for")
    return data
