"""Name the side files that go with a model's weights in a patch."""

from __future__ import annotations

from ..durable.fileio import open_for_reading
from ..files.checkpoint import Checkpoint, classify_checkpoint
from ..files.folder.side_files import CARD


def side_names(model: Checkpoint) -> list[str]:
    """Return the names of a model's side files: those that are copied with it, its indexes of weights, and its card."""
    if model.given_as_file or not model.has_side_files:
        return []
    indexes = [part.prefix + part.index[0] for part in model.models if part.index]
    named = {*classify_checkpoint(model)[0], *indexes, CARD}
    return sorted(name for name in named if (model.folder / name).is_file())


def read_side_file(model: Checkpoint, name: str) -> bytes:
    with open_for_reading(model.folder / name) as file:
        return file.read()
