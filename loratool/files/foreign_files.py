"""Tell what in an output folder is not loratool's, so that --force never removes a file of the user's."""

from __future__ import annotations

import filecmp
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from .model_card import is_unedited
from .model_folder import component_names, is_pipeline
from .sentence_transformers import transformer_folder
from .side_files import CARD, CODE, INITIAL, MODELFILE, matches, side_row

# The weights and undo files in the output folders that loratool writes
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.gguf",
    "*pytorch_model*.bin",
    "*pytorch_model.bin.index.json",
    "loratool.undo*",
    f"{INITIAL}/adapter_model.safetensors",
    f"{INITIAL}/adapter_config.json",
)


def find_foreign_file(folder: Path, origins: Collection[Path], contents: Mapping[str, bytes]) -> str | None:
    """Return a name in an output folder that loratool does not write, and that --force must not remove.

    A text of any name may be one that travelled, or the user's own: it is ours if it is in no other words elsewhere.

    Args:
        origins: folders that are read: their files stay.
        contents: of side files that will be written again, by name.
    """
    inner = component_names(folder) if is_pipeline(folder) else [transformer_folder(folder)]
    prefixes = tuple(f"{name}/" for name in inner if name)
    names, weights = [], False
    for name in _names_in(folder):
        own = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        if not _is_by_name(own) and not _is_kept(folder, name, origins, contents):
            return name
        names.append(name)
        weights = weights or matches(own, WEIGHTS)
    return names[0] if names and not weights else None  # configs or scripts without weights are no output of ours


def _is_by_name(name: str) -> bool:
    """Return whether a file's name alone tells that it is one of those that loratool writes; a script's does not."""
    row = side_row(name)
    return matches(name, (*WEIGHTS, MODELFILE, "adapter_config.json")) or bool(row and row.always and row.kind != CODE)


def _is_kept(folder: Path, name: str, origins: Collection[Path], contents: Mapping[str, bytes]) -> bool:
    """Return whether a file's bytes are elsewhere too, under its name, or those of a card that nobody has edited."""
    if not (folder / name).is_file() or (folder / name).is_symlink():
        return False
    if name == CARD and is_unedited((folder / name).read_bytes()):
        return True
    if name in contents:
        return (folder / name).read_bytes() == contents[name]
    places = (place / name for place in origins if (place / name).is_file())
    return any(filecmp.cmp(folder / name, place, shallow=False) for place in places)


def _names_in(folder: Path) -> Iterator[str]:
    """Yield files, links and, with a slash, empty folders: one by one, because a home directory has millions."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            yield entry.name
        elif not any(entry.iterdir()):
            yield f"{entry.name}/"
        else:
            found = (inner for inner in entry.rglob("*") if inner.is_symlink() or not inner.is_dir())
            yield from (inner.relative_to(folder).as_posix() for inner in found)
