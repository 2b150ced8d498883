"""Hold a format to one class and one row: a toy one (`toy_format`) is in the help, the matrix and every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, ROOT, factors, load_model, write_peft
from lib.harness.toy_format import Toy
from lib.oracles import matrix
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import FORMATS, open_adapter
from loratool.errors import InputError, NeedsFlag
from loratool.numerics.tensors import tensor_of

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
BASE = FIXTURES / "llama" / "base"
HELP = f"""import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from loratool.adapters.formats import FORMATS
from lib.harness.toy_format import Toy
FORMATS[Toy.key] = Toy()
from loratool.cli import _run
for command in sys.argv[1:]:
    _run([command, "--help"])
"""


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    specs = {name: tensor.shape for name, tensor in load_model(BASE).items()}
    pairs = {name: factors(*specs[f"{name}.weight"], 4, seed=i) for i, name in enumerate((Q, DOWN))}
    return write_peft(tmp_path / "lora", pairs, lora_alpha=2, r=4)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, types_read_anew: None) -> None:
    """Add the row."""
    monkeypatch.setitem(FORMATS, Toy.key, Toy())


def deltas(path: Path) -> dict[str, torch.Tensor]:
    adapter: Adapter = open_adapter(path)
    found = {}
    for module, update in adapter.updates.items():
        loaded: Any = adapter.load(update)
        found[module] = loaded.scale * tensor_of(loaded.B).double() @ tensor_of(loaded.A).double()
    adapter.file.close()
    return found


def test_it_is_in_the_help() -> None:
    """In a process of its own, since click reads the table where its commands are defined."""
    commands = ["convert", "extract", "init", "resize", "combine"]
    result = subprocess.run([sys.executable, "-c", HELP, *commands], capture_output=True, text=True)
    assert " ".join(result.stdout.split()).count(Toy.title.replace(":", "")) == len(commands), result.stderr


def test_it_is_in_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Path) -> None:
    def write(path: Path) -> Path:
        loratool.convert(lora, path, to="toy")
        return path

    names = ("PEFT, of a language model", "PEFT, DoRA", "PEFT, of an image model", "kohya, Flux and SD 3")
    rows = {name: matrix.READABLE[name] for name in names}
    monkeypatch.setattr(matrix, "READABLE", {**rows, "toy": write})
    cells, heads = {}, list[str]()
    for line in filter(None, matrix.matrix(tmp_path).splitlines()):
        name, *values = [cell.strip() for cell in line.split("|")[1:-1]]
        heads = values if name == "from" else heads
        cells |= {(name, head): value for head, value in zip(heads, values, strict=True)}
    assert [cells[name, "toy"] for name in (*names, "toy")] == ["exact", "base", "exact", "split", "exact"]
    assert cells["toy", "peft"] == "exact" and ("toy", "kohya") not in cells  # as for another language model's
    held = [[cell.strip() for cell in line.split("|")[1:-1]] for line in matrix.held().splitlines()]
    assert ["`toy`", "one", "lora", "config", "no", "folder, file"] in held


def test_it_merges_as_what_it_was_converted_from(tmp_path: Path, lora: Path) -> None:
    report = loratool.convert(lora, tmp_path / "toy", to="toy")
    assert json.loads((tmp_path / "toy" / "toy.json").read_text())["lora_alpha"] == 2 and report.to == "toy"
    outs = [tmp_path / name for name in ("one", "two")]
    for adapter, out in zip((lora, tmp_path / "toy"), outs, strict=True):
        loratool.merge(BASE, adapter, out, undo=False)
    one, two = map(load_model, outs)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert loratool.convert(tmp_path / "toy", tmp_path / "back", to="peft").source_format == "toy"
    former, back = deltas(lora), deltas(tmp_path / "back")
    assert all(torch.equal(former[module], back[module]) for module in former)


def test_commands_write_it(tmp_path: Path, lora: Path) -> None:
    """Their errors are those of PEFT's adapter, whose numbers the toy has."""
    for to in ("peft", "toy"):
        out, options = tmp_path / to, {"to": to, "rank": 2}
        out.mkdir()
        loratool.resize(lora, out / "resized", **options)
        loratool.combine([lora, (lora, 0.5)], out / "combined", **options)
        some = {"target": ("q_proj",), "layers": "0"}
        loratool.extract(BASE, FIXTURES / "llama" / "tuned", out / "extracted", **some, **options)
        loratool.init(BASE, out / "started", **some, **options)
    whole = loratool.extract(BASE, FIXTURES / "llama" / "tuned", tmp_path / "out", to="toy", rank=1, layers="0")
    assert "model.layers.0.input_layernorm.weight" in whole.left_out and not whole.exact  # it holds no values
    for name in ("resized", "combined", "extracted", "started"):
        assert (tmp_path / "toy" / name / "toy.json").is_file()
        one, two = deltas(tmp_path / "peft" / name), deltas(tmp_path / "toy" / name)
        assert one.keys() == two.keys() and all(torch.equal(one[module], two[module]) for module in one), name


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    dora = matrix.READABLE["PEFT, DoRA"](tmp_path / "dora")
    with pytest.raises(NeedsFlag, match="is DoRA, whose change depends on the base"):
        loratool.convert(dora, tmp_path / "out", to="toy")
    saved = write_peft(tmp_path / "saved", {Q: factors(8, 8, 4)}, modules_to_save=["head"])
    file = saved / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.head.weight": torch.ones(2, 8)}, file)
    with pytest.raises(NeedsFlag, match="are more than toy's files can hold: head") as refused:
        loratool.convert(saved, tmp_path / "out", to="toy")
    assert refused.value.remedy == "add --exclude head to exclude them; a merge applies them to the base"
    new_weight = write_peft(tmp_path / "new", {Q: factors(8, 8, 4)})
    file = new_weight / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{Q}.base_layer.weight": torch.ones(8, 8)}, file)
    with pytest.raises(InputError, match="a new weight under its factors, which toy cannot store"):
        loratool.convert(new_weight, tmp_path / "out", to="toy")
