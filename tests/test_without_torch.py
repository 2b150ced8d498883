"""Commands without an import of torch, which takes longer than a small merge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conftest import FIXTURES, ROOT, load_model, write_model

LLAMA, GPT2, SDXL = (FIXTURES / name for name in ("llama", "gpt2", "sdxl"))

# Runs the commands of a JSON list, and prints the exit code of each with the places in loratool that import torch
BLOCKED = """
import json, sys, traceback
places = []
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            frames = [f for f in traceback.extract_stack() if "/loratool/" in f.filename]
            places.append([f"{f.filename}:{f.lineno}" for f in frames[-3:]])
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, NoTorch())
from loratool.cli import _run
results = []
for argv in json.loads(sys.argv[1]):
    results.append([argv, _run(argv), places[:]])
    places.clear()
print(json.dumps(results))
"""


def run_without_torch(*commands: tuple[object, ...]) -> list[tuple[list[str], int, list[list[str]]]]:
    """Run commands in one process that cannot import torch: each with its exit code and where it imports torch."""
    listed = json.dumps([[str(word) for word in argv] for argv in commands])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BLOCKED, listed], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results: list[tuple[list[str], int, list[list[str]]]] = json.loads(done.stdout.splitlines()[-1])
    return results


def there_and_back(folder: Path, base: Path, adapter: Path, *options: str) -> list[tuple[object, ...]]:
    """The commands that merge, verify and undo."""
    folder.mkdir()
    out, back = (folder / f"{word}{base.suffix}" for word in ("out", "back"))
    return [
        ("merge", base, adapter, "-o", out, *options),
        ("verify", base, adapter, out),
        ("unmerge", out, adapter, "-o", back),
    ]


def test_no_import_of_torch(tmp_path: Path) -> None:
    base, adapter = LLAMA / "base", LLAMA / "adapter"
    pickled, rounded = tmp_path / "pickled", tmp_path / "rounded"
    pickled.mkdir()
    torch.save(load_model(base), pickled / "pytorch_model.bin")
    shutil.copy(base / "config.json", pickled)
    write_model(rounded, with_rounded_change(base, adapter), json.loads((base / "config.json").read_text()))
    results = run_without_torch(
        *there_and_back(tmp_path / "shards", base, adapter),
        *there_and_back(tmp_path / "codes", LLAMA / "fp8", adapter),
        *there_and_back(tmp_path / "requantized", LLAMA / "fp8", adapter, "--quantized", "requantize"),
        *there_and_back(tmp_path / "folder", GPT2 / "base", GPT2 / "adapter"),
        *there_and_back(tmp_path / "file", SDXL / "base.safetensors", SDXL / "adapter.safetensors"),
        *there_and_back(tmp_path / "pickle", pickled, adapter),
        ("verify", base, adapter, rounded),
        ("inspect", base),
        ("inspect", adapter, "--base", base),
        ("count", base, "--rank", "8"),
        ("diff", base, rounded),
        ("convert", base, "--dtype", "fp32", "-o", tmp_path / "wide"),
        ("verify", base, adapter, LLAMA / "tuned"),
    )
    for argv, code, places in results:
        assert not places, argv
        assert code == (argv[-1] == str(LLAMA / "tuned")), argv


def with_rounded_change(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The llama fixture merged with the change rounded to bf16 before it is added."""
    tensors, factors = load_model(base), load_model(adapter)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        A, B = (factors[f"base_model.model.{name.replace('.weight', f'.lora_{side}.weight')}"].float() for side in "AB")
        tensors[name] = tensors[name] + (2 * (B @ A)).bfloat16()
    return tensors
