"""Hold a bias that changes by a product with its module's weight (path C of PEFT's GLoRA) in all ways to read a base.

What it is in numbers is held by `test_lycoris_merge` and `test_peft_tables`. Here the same layer is stored in other
ways, and the oracle is the same definition in fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model
from lib.files.lycoris_files import SHAPES, Base, Numbers, Peft, base_of, peft_of
from lib.oracles.dense_oracle import merged_codes, peft_updates
from lib.oracles.fractions_oracle import count_wrong
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError
from loratool.views.inspect_adapter import AdapterInspection

BF16, FP32 = torch.bfloat16, torch.float32
Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"model_type": "qwen2", "num_hidden_layers": 1, "architectures": ["Qwen2ForCausalLM"]}


def adapter_at(folder: Path, path: str, kind: str = "glora weighed", **fields: Any) -> tuple[Path, Peft]:
    """Write the adapter of a module of another name."""
    made = peft_of(kind, FP32)
    Peft(made.layer, made.roles, {**made.config, **fields, "target_modules": [path]}).write(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(f"blocks.0.{made.layer}", path): x for name, x in load_file(file).items()}, file)
    return folder, made


def wanted_of(base: Base, made: Peft, weight: float = 1.0) -> Mapping[str, list[int]]:
    codes = merged_codes(base, peft_updates(made, SHAPES[base.layer], weight))
    return {end: codes[f"{base.path}.{end}"] for end in ("weight", "bias")}


def tensors_of(base: Base, path: str = Q) -> dict[str, Tensor]:
    """Return the layer, and others so that its tensors are in two shards."""
    return {"lm_head.weight": torch.ones(3, 6), f"{path}.weight": base.weight, f"{path}.bias": base.bias}


def is_right(found: Mapping[str, Tensor], wanted: Mapping[str, list[int]], path: str = Q) -> bool:
    return all(count_wrong(found[f"{path}.{end}"], codes) == 0 for end, codes in wanted.items())


def test_shards_workers_and_an_iterator(tmp_path: Path) -> None:
    base = base_of("linear", BF16)
    adapter, made = adapter_at(tmp_path / "adapter", Q)
    model = write_model(tmp_path / "base", tensors_of(base), CONFIG, shards=3)
    loratool.merge(model, (adapter, 0.7), tmp_path / "out", workers=2)
    found = {name: x for file in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(file).items()}
    assert is_right(found, wanted_of(base, made, 0.7))
    for name, x in loratool.iter_merged(model, (adapter, 0.7)):
        assert torch.equal(x, found[name])
    assert loratool.verify(model, (adapter, 0.7), tmp_path / "out").status == "proven"
    loratool.unmerge(tmp_path / "out", (adapter, 0.7), tmp_path / "back")
    for file in model.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_weight_of_codes(tmp_path: Path) -> None:
    """W is what its codes and scale mean."""
    base, scale = base_of("linear", FP32), torch.tensor(1 / 64)
    coded = (base.weight / scale).clamp(-400, 400).to(torch.float8_e4m3fn)
    tensors = {**tensors_of(base), f"{Q}.weight": coded, f"{Q}.weight_scale_inv": scale}
    fp8 = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    model = write_model(tmp_path / "base", tensors, fp8, shards=2)
    adapter, made = adapter_at(tmp_path / "adapter", Q)
    loratool.merge(model, adapter, tmp_path / "out", dtype="fp32", quantized="mixed")
    found = {name: x for file in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(file).items()}
    assert is_right(found, wanted_of(Base("linear", FP32, coded.float() * scale, base.bias), made))
    assert loratool.verify(model, adapter, tmp_path / "out").status == "proven"
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    for file in model.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_rows_of_a_fused_tensor(tmp_path: Path) -> None:
    """The bias and the weight of the module are the same rows of two tensors."""
    base, n = base_of("linear", BF16), Numbers(BF16, 5)
    above, below = n(25, 6), n(25, 6)
    name = "model.layers.0.self_attn.qkv_proj"
    tensors = {f"{name}.weight": torch.cat([above, base.weight, below])}
    tensors[f"{name}.bias"] = torch.cat([above[:, 0], base.bias, below[:, 0]])
    model = write_model(tmp_path / "base", tensors, {"model_type": "unlimited_ocr", "num_hidden_layers": 1})
    adapter, made = adapter_at(tmp_path / "adapter", Q.replace("q_proj", "k_proj"))
    loratool.merge(model, adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = {f"{Q}.{end}": found[f"{name}.{end}"][25:50] for end in ("weight", "bias")}
    assert is_right(own, wanted_of(base, made))
    assert torch.equal(found[f"{name}.bias"][50:], below[:, 0])
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_in_place_of_another_merge(tmp_path: Path) -> None:
    """The base's weight is read from the merged one and its undo file."""
    base = base_of("linear", BF16)
    model = write_model(tmp_path / "base", tensors_of(base), CONFIG, shards=3)
    one, _ = adapter_at(tmp_path / "one", Q, "glora constant")
    two, made = adapter_at(tmp_path / "two", Q)
    loratool.merge(model, one, tmp_path / "old")
    loratool.merge(tmp_path / "old", two, tmp_path / "out", replace=one)
    found = {name: x for file in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(file).items()}
    assert is_right(found, wanted_of(base, made))
    loratool.merge(tmp_path / "out", one, tmp_path / "again", replace=two)
    for file in (tmp_path / "old").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_where_the_weight_may_have_changed_before(tmp_path: Path) -> None:
    model = write_model(tmp_path / "base", tensors_of(base_of("linear", BF16)), CONFIG)
    adapter, _ = adapter_at(tmp_path / "adapter", Q)
    other, _ = adapter_at(tmp_path / "other", Q, "glora constant")
    match = "changes by a product with its module's weight"
    loratool.merge(model, adapter, tmp_path / "out")
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=match) as refused:
        loratool.merge(model, adapter, in_place=True)
    assert refused.value.culprit == f"{Q}.bias" and refused.value.remedy == "write another model with -o"
    assert (model / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match=match):
        loratool.unmerge(tmp_path / "out", adapter, in_place=True)
    with pytest.raises(InputError, match=match):
        loratool.merge(tmp_path / "out", other, in_place=True, replace=adapter)
    live = load_file(model / "model.safetensors")
    with pytest.raises(InputError, match=match) as refused:
        loratool.live.merge(live, adapter)
    assert refused.value.remedy and "merge the files" in refused.value.remedy
    assert all(torch.equal(x, live[name]) for name, x in load_file(model / "model.safetensors").items())


def test_a_weight_that_is_not_there_to_be_read(tmp_path: Path) -> None:
    base = base_of("linear", BF16)
    model = write_model(tmp_path / "base", tensors_of(base), CONFIG)
    adapter, _ = adapter_at(tmp_path / "adapter", Q)
    with pytest.raises(InputError, match="has not its rows in one changed tensor") as refused:
        loratool.merge(model, adapter, tmp_path / "out", exclude="*.q_proj")
    assert refused.value.culprit == f"{Q}.bias" and "select the weight too" in str(refused.value.remedy)
    base.weight[3, 2] = torch.inf
    broken = write_model(tmp_path / "broken", tensors_of(base), CONFIG)
    with pytest.raises(InputError, match="has rows with inf or nan"):
        loratool.merge(broken, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_and_a_patch(tmp_path: Path) -> None:
    """The size of the change is that in the merged model; a patch is predicted from base and adapter."""
    base = base_of("linear", FP32)
    model, adapter = base.write(tmp_path / "base.safetensors"), peft_of("glora weighed", FP32).write(tmp_path / "a")
    out, patch = tmp_path / "out.safetensors", tmp_path / "patch"
    loratool.merge(model, adapter, out)
    report = loratool.inspect(adapter, base=model)
    assert isinstance(report, AdapterInspection)
    (row,) = (each for each in report.details if each.name.endswith(".bias"))
    change = load_file(out)[f"{base.path}.bias"].double() - base.bias.double()
    assert row.norm is not None and abs(row.norm - float(change.norm())) < 1e-6 * row.norm
    loratool.patch(model, out, patch, adapter=adapter)
    loratool.apply(model, patch, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
