"""Read modules.json, the file in which sentence-transformers lists the modules of a model.

The transformer is in the model's folder. Older versions saved it in a subfolder like `0_Transformer`. Pooling and dense
layers are in subfolders.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...durable.fileio import is_beside, open_for_reading
from ...errors import InputError

MODULES = "modules.json"

DENSE = ("[0-9]_*/model.safetensors",)  # weights of dense layers, which a merge can take from an adapter's folder

MOST = 1 << 20  # bytes of a modules.json


def module_folders(folder: Path) -> list[str]:
    """Return the subfolders that a model's modules.json lists; [] without the file.

    Raises:
        InputError: a module is outside the model's folder.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    with open_for_reading(path) as file:
        data = file.read(MOST + 1)
    try:
        listed = json.loads(data.decode("utf-8-sig")) if len(data) <= MOST else None
    except (ValueError, RecursionError):
        return []
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    folders = [row["path"].rstrip("/") for row in rows if isinstance(row.get("path"), str) and row["path"]]
    for name in folders:
        if not all(map(is_beside, name.split("/"))):
            raise InputError(f"names {name!r}, which is not a folder beside it", culprit=str(path))
    return list(dict.fromkeys(folders))


def transformer_folder(folder: Path) -> str | None:
    """Return the subfolder with a model's transformer; None if the transformer is in the model's folder."""
    if not (folder / MODULES).is_file() or _is_transformer(folder):
        return None
    models = (name for name in module_folders(folder) if "/" not in name and _is_transformer(folder / name))
    return next(models, None)


def _is_transformer(folder: Path) -> bool:
    """Return whether the config in a folder is a transformer's, not that of a pooling or dense layer."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    with open_for_reading(path) as file:
        text = file.read(MOST)
    return b'"model_type"' in text or b'"hidden_size"' in text
