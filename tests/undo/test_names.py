"""Hold merges of files with names that are no text, or none elsewhere: what is written can be undone, or is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import factors, weights, write_peft
from safetensors.torch import save_file

import loratool


@pytest.mark.parametrize("name", [b"\xff", b"a\nb", "\u5927\u00df".encode(), b"a:b\\c"])
def test_an_adapter_of_any_name_comes_off(name: bytes, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / os.fsdecode(name), {"a": factors(6, 4, 2)})
    save_file({"a.weight": weights(6, 4)}, tmp_path / "base.safetensors")
    for out in ("m.safetensors", "m"):
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / out)
        loratool.unmerge(tmp_path / out, adapter, tmp_path / "z.safetensors", force=True)
        assert (tmp_path / "z.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


@pytest.mark.parametrize("name", [b"w\xff.safetensors", b"a:b.safetensors", b"a\\b.safetensors"])
def test_a_base_whose_name_no_undo_file_gives_back(name: bytes, tmp_path: Path) -> None:
    """A reader takes no such name, lest it lead out of the folder on Windows."""
    adapter = write_peft(tmp_path / "adapter", {"a": factors(6, 4, 2)})
    (tmp_path / "base").mkdir()
    save_file({"a.weight": weights(6, 4)}, tmp_path / "plain.safetensors")
    shutil.move(tmp_path / "plain.safetensors", os.path.join(tmp_path, "base", os.fsdecode(name)))
    with pytest.raises(loratool.NeedsFlag, match="no undo file can restore") as refused:
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert str(refused.value.remedy).startswith("add --no-undo") and not (tmp_path / "out").exists()
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
