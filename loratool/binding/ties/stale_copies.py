"""Find tensors that no longer match a merged model: MTP layers, and their copies of the vocabulary.

MTP layers draft tokens for the model that they were trained with. They run with the merged model, which checks every
token, but more of their drafts fail. A copy of the embedding or the head in them is no longer the model's.
"""

from __future__ import annotations

from collections.abc import Collection

from ...architectures.beside_layers import Layers
from ...architectures.ties import COPIES, INPUT_EMBEDDINGS
from ...files.checkpoint import Checkpoint
from ..modules.resolve import strip_wrappers

VOCABULARY = frozenset({*INPUT_EMBEDDINGS, *COPIES, "head"})  # last names; DeepSeek-V3's is shared_head.head


def stale_notes(base: Checkpoint, changed: Collection[str]) -> tuple[str, ...]:
    """Return a note on unchanged MTP layers and copies in them, if an adapter changes the rest of the model.

    A copy is an embedding or a head of the same type and shape, with equal first, middle and last rows in the base.
    """
    layers = Layers.find((), base.config)
    mtp = {name: None for name in base.specs if layers.is_mtp(strip_wrappers(name))}
    originals = [name for name in changed if name in base.specs and name not in mtp]
    stale = [name for name in mtp if name not in changed]
    if not originals or not stale:
        return ()
    words = [name for name in originals if _is_vocabulary(name)]
    copies = [n for n in stale if _is_vocabulary(n) and any(_looks_equal(base, word, n) for word in words)]
    notes = []
    if len(stale) == len(mtp):
        notes.append(f"the MTP layers are unchanged, and were trained with the unmerged model: {stale[0]}, ...")
    if copies:
        notes.append(f"copies of changed tensors are unchanged: {', '.join(copies)}")
    return ("; ".join(notes),) if notes else ()


def _is_vocabulary(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in VOCABULARY


def _looks_equal(base: Checkpoint, name: str, other: str) -> bool:
    import numpy as np

    spec = base.specs[name]
    if spec != base.specs[other] or not spec.size:
        return False
    one, two, count = base.ref(name), base.ref(other), spec.shape[0]
    return all(
        np.array_equal(one.read_matrix(count, row, row + 1).wide(), two.read_matrix(count, row, row + 1).wide())
        for row in sorted({0, count // 2, count - 1})
    )
