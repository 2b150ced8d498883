"""Hold the digests that a merge and its way back report to those of what is on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, weights, write_model, write_peft
from safetensors.torch import load_file

import loratool

LLAMA, GPT2, SDXL = FIXTURES / "llama", FIXTURES / "gpt2", FIXTURES / "sdxl"


def tied(folder: Path) -> Path:
    """Write a torch base whose names share their bytes, and an empty tensor."""
    folder.mkdir(parents=True)
    W = weights(6, 4)
    tensors = {"x.weight": W, "same.weight": W, "none": torch.zeros(0, 3)}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def small(folder: Path) -> tuple[Path, Path]:
    adapter = write_peft(folder / "a", {"x": factors(6, 4, 2)})
    return write_model(folder / "base", {"x.weight": weights(6, 4), "none": torch.zeros(0, 3)}), adapter


def of_torch(folder: Path) -> tuple[Path, Path]:
    return tied(folder / "base"), write_peft(folder / "a", {"x": factors(6, 4, 2)})


PLAIN = LLAMA / "base", LLAMA / "adapter"
CASES: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str, dict[str, Any]]] = {
    "shards": (lambda _: PLAIN, "out", {}),
    "one file": (lambda _: (GPT2 / "base" / "model.safetensors", GPT2 / "adapter"), "out.safetensors", {}),
    "sdxl": (lambda _: (SDXL / "base.safetensors", SDXL / "adapter.safetensors"), "out.safetensors", {}),
    "empty": (small, "out", {}),
    "torch": (of_torch, "out", {}),
    "mixed": (lambda _: (LLAMA / "fp8", LLAMA / "adapter"), "out", {"quantized": "mixed"}),
    "dequantize": (lambda _: (LLAMA / "fp8", LLAMA / "adapter"), "out", {"quantized": "dequantize"}),
    "requantize": (lambda _: (LLAMA / "fp8", LLAMA / "adapter"), "out", {"quantized": "requantize"}),
    "no undo": (lambda _: PLAIN, "out", {"undo": False, "digest": True}),
    "fp32": (lambda _: PLAIN, "out", {"undo": False, "digest": True, "dtype": "fp32"}),
    "like": (lambda _: PLAIN, "out", {"undo": False, "digest": True, "like": LLAMA / "fp8"}),
}


def digest(path: str | Path) -> str | None:
    return loratool.inspect(path, digest=True).digest


@pytest.mark.parametrize("case", CASES)
def test_reports_have_the_digests_of_what_is_on_the_disk(tmp_path: Path, case: str) -> None:
    make, name, options = CASES[case]
    base, adapter = make(tmp_path)
    out, back = tmp_path / name, tmp_path / f"back{Path(name).suffix}"
    report = loratool.merge(base, adapter, out, **options)
    assert report.digests == {str(each): digest(each) for each in (base, adapter, out)}
    if options.get("undo", True):
        restored = loratool.unmerge(out, adapter, back)
        assert restored.digests == {str(each): digest(each) for each in (out, adapter, back)}


def test_a_name_with_a_tab_has_none_and_comes_back(tmp_path: Path) -> None:
    tensors = {"x.weight": weights(6, 4), "a\tb": weights(3)}
    base, adapter = write_model(tmp_path / "base", tensors), write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
    assert loratool.merge(base, adapter, tmp_path / "out").digests.keys() == {str(adapter)}
    assert loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back").digests.keys() == {str(adapter)}
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], x) for name, x in tensors.items())
    with pytest.raises(loratool.InputError, match="tab or a line break"):
        loratool.merge(base, adapter, tmp_path / "none", undo=False, digest=True)
    assert not (tmp_path / "none").exists()
