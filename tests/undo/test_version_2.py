"""Hold that undo files of version 2, which the loratool before this layout wrote, still give back the base."""

from __future__ import annotations

import base64
import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from undo_bytes import forge
from version_2 import MODELS, STORED, merge

import loratool
from loratool.errors import InputError


def stored(name: str, folder: Path) -> Path:
    """Merge a model, and put in place of its undo file the one of version 2."""
    undo = merge(name, folder)
    undo.write_bytes(base64.b64decode(json.loads(STORED.read_text())[name]))
    assert undo.read_bytes().startswith(b"loratool undo 2\n")
    return undo


@pytest.mark.parametrize("name", MODELS)
def test_the_base_comes_back(tmp_path: Path, name: str) -> None:
    stored(name, tmp_path / "made")
    loratool.unmerge(tmp_path / "made" / "merged", tmp_path / "made" / "adapter", tmp_path / "back")
    files = [path.name for path in (tmp_path / "made" / "base").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "made" / "base", tmp_path / "back", files, False) == (files, [], [])


COPIED, CODED = "model.embed_tokens.weight", "x.weight"


def of(tensor: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda index: change(index["tensors"][tensor])


def put(owner: Any, key: Any, value: Any) -> None:
    owner[key] = value


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a place before the file": ("rows that were cut", of(COPIED, lambda entry: put(entry["records"][0], 2, -1))),
    "a place of another": ("rows that were cut", of(COPIED, lambda entry: put(entry["records"][0], 2, 17))),
    "a longer record": ("rows that were cut", of(COPIED, lambda entry: put(entry["records"][0], 3, 1 << 62))),
    "a hash in capitals": ("rows that were cut", of(COPIED, lambda entry: put(entry["records"][0], 4, "A" * 64))),
    "a sum of 65 bits": ("rows that were cut", of(COPIED, lambda entry: put(entry["records"][0], 5, 1 << 64))),
    "a record more": ("rows that were cut", of(COPIED, lambda entry: entry["records"].append(entry["records"][0]))),
    "no records": ("rows that were cut", of(COPIED, lambda entry: entry.pop("records"))),
    "another row copied": ("rows that were cut", of(COPIED, lambda entry: put(entry["copied"], 0, 19))),
    "no row copied": ("rows that were cut", of(COPIED, lambda entry: put(entry["copied"], 0, -1))),
    "no hashes": ("rows that were cut", of(COPIED, lambda entry: put(entry["copied"], 2, []))),
    "scales elsewhere": ("codes to numbers", of(CODED, lambda entry: put(entry["coded"]["kept"][0], 0, 20))),
    "no scales": ("codes to numbers", of(CODED, lambda entry: put(entry["coded"], "kept", []))),
    "no type": ("codes to codes", of(CODED, lambda entry: put(entry, "records", [5]))),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    name, change = LIES[lie]
    forge(stored(name, tmp_path / "made"), change)
    with pytest.raises(InputError, match="is cut off or damaged"):
        loratool.unmerge(tmp_path / "made" / "merged", tmp_path / "made" / "adapter", tmp_path / "back")
    assert not (tmp_path / "back").exists()
