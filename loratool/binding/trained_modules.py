"""Tell of modules of sentence-transformers beside an adapter that were trained with it, which no merge adds."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

from ..files.sentence_transformers import module_folders, transformer_folder
from .merge_plan import MergePlan

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a dense layer


def module_notes(plan: MergePlan) -> Iterator[str]:
    """Yield a warning for each adapter whose folder has a module that is not the base's: its transformer alone counts.

    Raises:
        InputError: a folder's modules.json names modules that lie elsewhere.
    """
    base = plan.base.root
    for adapter, _ in plan.adapters:
        folder = adapter.file.path.parent
        folders = [name for name in module_folders(folder) if name != transformer_folder(folder)]
        absent = [name for name in folders if not (base / name).is_dir()]
        other = [name for name in folders if name not in absent and _has_other_weights(folder / name, base / name)]
        if absent:
            yield (
                f"{adapter.name} has modules of sentence-transformers that the base has not ({', '.join(absent)}): "
                "they are not in the output"
            )
        if other:
            yield (
                f"{adapter.name} has other weights than the base in {', '.join(other)}, and the output has the base's: "
                "copy the folder over if it was trained with the adapter"
            )


def _has_other_weights(folder: Path, base: Path) -> bool:
    files = [name for name in WEIGHTS if (folder / name).is_file()]
    equal = (name for name in files if (base / name).is_file() and filecmp.cmp(folder / name, base / name, False))
    return bool(files) and not any(equal)
