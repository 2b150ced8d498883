"""Add a kind of update in one class and one row (`toy_kind.py`), and see every command that knows kinds take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import weights, write_model
from safetensors.torch import load_file, save_file
from toy_kind import circulant

N, SCALE = 12, 2.0
TESTS = Path(__file__).parents[1]
W, COLUMN = weights(N, N, dtype=torch.bfloat16, seed=1), weights(N, dtype=torch.bfloat16, seed=2)


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that has the row in the table from its start."""
    paths = os.pathsep.join([str(TESTS), *sys.path])
    command = [sys.executable, str(TESTS / "toy_kind.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


def peft(folder: Path) -> Path:
    folder.mkdir()
    save_file({"base_model.model.q.circ_c": COLUMN}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "CIRC", "circ_alpha": SCALE}))
    return folder


def kohya(file: Path) -> Path:
    save_file({"lora_unet_q.circ": COLUMN, "lora_unet_q.alpha": torch.tensor(SCALE)}, file)
    return file


@pytest.mark.parametrize("write", [peft, kohya], ids=["peft", "kohya"])
def test_merged_proven_and_undone(write: object, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", {"q.weight": W}, {"model_type": "llama"}), write(tmp_path / "a")  # type: ignore[operator]
    made = run("merge", base, adapter, "-o", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    assert torch.equal(found, (W.double() + SCALE * circulant(COLUMN.double())).bfloat16())
    proof = run("verify", base, adapter, tmp_path / "out", "--json")
    assert json.loads(proof.stdout)["report"]["status"] == "proven", proof.stdout + proof.stderr
    assert run("unmerge", tmp_path / "out", adapter, "-o", tmp_path / "back").returncode == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_inspected_and_refused_by_name(tmp_path: Path) -> None:
    adapter = kohya(tmp_path / "a.safetensors")
    found = run("inspect", adapter)
    assert found.returncode == 0 and "circulant" in found.stdout and f"{N}x{N}" in found.stdout
    same = run("diff", adapter, adapter)
    assert "circulant" in same.stdout and "the same change" in same.stdout
    made = run("convert", peft(tmp_path / "p"), "--to", "loralib", "-o", tmp_path / "out.safetensors")
    assert made.returncode == 4 and "circulant" in made.stderr and not (tmp_path / "out.safetensors").exists()


def test_it_is_a_file_and_a_row() -> None:
    """What knows kinds asks the class: none of them is named in the rooms between the formats and the commands."""
    said = {"loha", "lokr", "tucker", "adalora", "vera", "ia3", "diff"}
    package = TESTS.parent / "loratool"
    for room in ("binding", "undo", "streaming", "numerics"):
        for file in (package / room).rglob("*.py"):
            assert not any(f'"{word}"' in file.read_text() for word in said), file
