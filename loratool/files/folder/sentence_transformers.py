"""Read modules.json, by which sentence-transformers finds the modules of a model.

The transformer lies in the model's folder or, as older versions saved it, in one of its own like `0_Transformer`;
pooling and dense layers lie in folders beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...durable.fileio import is_beside, open_for_reading
from ...errors import InputError

MODULES = "modules.json"

DENSE = ("[0-9]_*/model.safetensors",)  # weights of modules that a merge can take from beside an adapter

MOST = 1 << 20  # bytes of a modules.json that is read


def module_folders(folder: Path) -> list[str]:
    """Return the folders below a model's own in which it has modules, as its modules.json says; [] if it has none.

    Raises:
        InputError: one lies elsewhere.
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
    found = [row["path"].rstrip("/") for row in rows if isinstance(row.get("path"), str) and row["path"]]
    for name in found:
        if not all(map(is_beside, name.split("/"))):
            raise InputError(f"names {name!r}, which is no folder beside it", culprit=str(path))
    return list(dict.fromkeys(found))


def transformer_folder(folder: Path) -> str | None:
    """Return the folder below a model's own in which its transformer lies; None if it lies in that itself."""
    if not (folder / MODULES).is_file() or _is_transformer(folder):
        return None
    models = (name for name in module_folders(folder) if "/" not in name and _is_transformer(folder / name))
    return next(models, None)


def _is_transformer(folder: Path) -> bool:
    """Return whether a folder has the config of a transformer, which those of pooling and dense layers are not."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    with open_for_reading(path) as file:
        text = file.read(MOST)
    return b'"model_type"' in text or b'"hidden_size"' in text
