"""Add a kind of update in one class and one row (`toy_kind.py`), and see every command that knows kinds take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import weights, write_model
from safetensors.torch import load_file, save_file
from toy_kind import circulant

N, SCALE = 12, 2.0
TESTS = Path(__file__).parents[1]
W, COLUMN = weights(N, N, dtype=torch.bfloat16, seed=1), weights(N, dtype=torch.bfloat16, seed=2)


def run(*commands: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Run command lines in a process that has the row in the table from its start: exit code, stdout, stderr."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    text = json.dumps([[str(word) for word in command] for command in commands])
    made = subprocess.run(
        [sys.executable, str(TESTS / "seams" / "toy_kind.py")], input=text, capture_output=True, text=True, env=env
    )
    assert made.returncode == 0, made.stderr
    return [tuple(each) for each in json.loads(made.stdout)]


def peft(folder: Path) -> Path:
    folder.mkdir()
    save_file({"base_model.model.q.circ": COLUMN}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "CIRC", "circ_alpha": SCALE}))
    return folder


def kohya(file: Path) -> Path:
    save_file({"lora_unet_q.circ": COLUMN, "lora_unet_q.alpha": torch.tensor(SCALE)}, file)
    return file


def test_every_command_takes_it(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"q.weight": W}, {"model_type": "llama"})
    adapters = peft(tmp_path / "p"), kohya(tmp_path / "k.safetensors")
    out, back = ([tmp_path / f"{name}{i}" for i in range(2)] for name in ("out", "back"))
    commands = [
        command
        for i, adapter in enumerate(adapters)
        for command in (
            ("merge", base, adapter, "-o", out[i]),
            ("verify", base, adapter, out[i], "--json"),
            ("unmerge", out[i], adapter, "-o", back[i]),
        )
    ]
    inspected, same, refused = ("inspect", adapters[1]), ("diff", adapters[1], adapters[1]), tmp_path / "r.safetensors"
    found = run(
        *commands, inspected, same, ("inspect", adapters[0]), ("convert", adapters[0], "--to", "loralib", "-o", refused)
    )
    assert all(code == 0 for code, _, _ in found[:-1]), found
    wanted = (W.double() + SCALE * circulant(COLUMN.double())).bfloat16()
    for i in range(2):
        assert torch.equal(load_file(out[i] / "model.safetensors")["q.weight"], wanted)
        assert json.loads(found[3 * i + 1][1])["report"]["status"] == "proven"
        assert (back[i] / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert "circulant" in found[6][1] and f"{N}x{N}" in found[6][1]
    assert "circulant" in found[7][1] and "same: the same values in 1 tensor\n" in found[7][1]
    assert "peft circulant" in found[8][1]  # though LyCORIS's names end as PEFT's do
    assert found[9][0] == 3 and "circulant" in found[9][2] and not refused.exists()


def test_it_is_a_file_and_a_row() -> None:
    """What knows kinds asks the class: none of them is named in the rooms between the formats and the commands."""
    said = {"loha", "lokr", "tucker", "adalora", "vera", "ia3", "diff"}
    package = TESTS.parent / "loratool"
    for room in ("binding", "undo", "streaming", "numerics"):
        for file in (package / room).rglob("*.py"):
            assert not any(f'"{word}"' in file.read_text() for word in said), file
