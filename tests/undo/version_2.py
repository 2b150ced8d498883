"""Make the undo files of version 2 in `version-2.json`: called once, where loratool is of commit 6699eae6.

    PYTHONPATH=OLD python tests/undo/version_2.py     OLD: a checkout of that commit

The models and their merges are made anew by the tests, and have the same bytes.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from undo_models import write_codes, write_mixed, write_replaced_codes, write_resized

import loratool

STORED = Path(__file__).with_name("version-2.json")

# What is merged -> what writes it into a folder, and how codes are merged
MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "records of all types": (write_mixed, "mixed"),
    "norms": (partial(write_mixed, dora=True), "mixed"),
    "rows that were cut": (write_resized, "mixed"),
    "numbers for codes": (write_replaced_codes, "mixed"),
    "codes to numbers": (write_codes, "dequantize"),
    "codes to codes": (write_codes, "requantize"),
}


def merge(name: str, folder: Path) -> Path:
    """Merge one of `MODELS` in a folder, and return its undo file."""
    write, way = MODELS[name]
    write(folder)
    loratool.merge(folder / "base", folder / "adapter", folder / "merged", quantized=way, workers=1)
    return folder / "merged" / "loratool.undo"


def main() -> None:
    found = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = base64.b64encode(merge(name, Path(folder, "made")).read_bytes()).decode()
    STORED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
