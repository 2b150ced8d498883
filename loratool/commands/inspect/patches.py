"""Look into a patch: its index alone says what it is for."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from ...files.hub.cache import place_named
from ...patches.dialects.table import open_foreign_patch
from ...patches.patch_file import PatchFile
from ...views.inspect_delta import DeltaInspection
from ...views.inspect_patch import PatchedTensor, PatchInspection
from ...views.patch import BodySize


def inspect_delta(path: Path) -> DeltaInspection:
    """Return what a patch of another program says of itself.

    Raises:
        InputError: it is damaged, or not read.
    """
    with closing(open_foreign_patch(path)) as patch:
        return DeltaInspection(
            path=os.fspath(path),
            dialect=patch.dialect,
            version=patch.version,
            base_version=patch.base_version,
            how=patch.how,
            tensors=tuple(patch.changes),
            nbytes=sum(change.nbytes for change in patch.changes.values()),
        )


def inspect_patch(path: str | os.PathLike[str]) -> PatchInspection:
    """Return what a patch says of itself.

    Raises:
        InputError: it is damaged, forged or of another version.
    """
    with closing(PatchFile(place_named(path))) as patch:
        bodies, sizes = dict[str, list[int]](), patch.tensor_sizes()
        for span, row in zip(patch.spans, patch.rows, strict=True):
            size, total = row.length + (row.back or 0), bodies.setdefault(row.body, [0, 0, 0])
            total[0], total[1], total[2] = total[0] + 1, total[1] + span.nbytes, total[2] + size
        specs, new = patch.target.specs, {*patch.new}
        rows = tuple(
            PatchedTensor(
                name=name,
                dtype=spec.dtype,
                was="" if name in new else patch.cast.get(name, spec.dtype),
                nbytes=spec.nbytes,
                patch_nbytes=round(sizes[name]),
            )
            for name, spec in specs.items()
            if name in sizes
        )
        return PatchInspection(
            path=os.fspath(path),
            nbytes=patch.nbytes,
            model_nbytes=sum(spec.nbytes for spec in specs.values()),
            base_digest=patch.base_digest,
            digest=patch.digest,
            reversible=patch.reversible,
            files=tuple(file.name for file in patch.target.files),
            side=tuple(name for name, each in patch.side.items() if each.content is not None),
            bodies={key: BodySize(*total) for key, total in sorted(bodies.items())},
            tensors=rows,
            unchanged=len(specs) - len(rows),
            renamed=patch.renamed,
            new=patch.new,
            adapters=len(patch.adapters),
            removed=patch.index["removed"],
        )
