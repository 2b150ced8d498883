"""Look into adapters and models as mappings: numbers by safetensors, by peft, and by each kind's definition."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from lib.files.lycoris_files import KINDS, PEFT_KINDS, SHAPES, peft_of, roles_of, write_lycoris
from lib.oracles.dense_oracle import change_of, peft_updates
from lib.oracles.fractions_oracle import Add
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag, UsageError

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
Q = "model.layers.0.self_attn.q_proj"


def close_to(found: Tensor, wanted: list[Any]) -> bool:
    """Whether float64 numbers are these, to a few of its roundings of the largest."""
    largest = max(abs(float(x)) for x in wanted)
    pairs = zip(found.flatten().tolist(), wanted, strict=True)
    return all(math.isclose(x, float(y), rel_tol=0, abs_tol=1e-13 * largest) for x, y in pairs)


def test_an_adapter_is_a_mapping_of_modules() -> None:
    stored = load_file(ADAPTER / "adapter_model.safetensors")
    with loratool.open_adapter(ADAPTER) as adapter:
        says = "21 lora modules, rank 8, F32, 112 kB, for fixtures/llama/base"
        assert repr(adapter) == f"<peft adapter {ADAPTER}: {says}>" and adapter.base_model == "fixtures/llama/base"
        assert (adapter.path, adapter.format, adapter.config["r"], len(adapter)) == (str(ADAPTER), "peft", 8, 21)
        module = adapter[Q]
        assert repr(module) == f"<lora of {Q}: 64x64, rank 8, scale 2>"
        assert (module.name, module.kind, module.rank, module.scale, module.shape) == (Q, "lora", 8, 2.0, (64, 64))
        A, B = (stored[f"base_model.model.{Q}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(module.A, A) and torch.equal(module.B, B) and module.tensors.keys() == {"A", "B"}
        assert torch.equal(module.delta(), 2 * B.double() @ A.double())
        assert {f"base_model.model.{name}.lora_A.weight" for name in adapter} < stored.keys()
        assert "q_proj" not in adapter and adapter.get("q_proj") is None
        with pytest.raises(KeyError):
            adapter["q_proj"]
    for read in (lambda: module.A, module.delta, lambda: module.tensors):
        with pytest.raises(UsageError, match="is closed\nread it inside its with block"):
            read()
    assert module.rank == 8 and len(adapter) == 21  # what headers say stays


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_of_each_kind(kind: str, tmp_path: Path) -> None:
    layer, roles = KINDS[kind][0], roles_of(kind, torch.float32)
    file = write_lycoris(tmp_path / "adapter.safetensors", {"a.q": roles})
    with loratool.open_adapter(file) as adapter:
        module = next(each for name, each in adapter.items() if "bias" not in name)
        if module.kind in ("dora", "ia3", "oft_blocks", "lycoris_glora"):
            with pytest.raises(InputError, match=f"is {module.kind}: its delta depends on the weight\nmerge it"):
                module.delta()
        elif module.kind == "diff":
            assert torch.equal(module.delta(), roles["diff" if "diff" in roles else "w_norm"].double())
        else:
            assert math.prod(module.delta().shape) == math.prod(SHAPES[layer])
            assert close_to(module.delta(), list(change_of(roles).flat))
        if module.kind not in ("lora", "dora"):
            with pytest.raises(InputError, match=f"is {module.kind} and has no factors A and B\nits tensors are "):
                _ = module.A


NEEDS_THE_WEIGHT = (
    "ia3 vera pvera randlora fourierft waveft miss bone shira oft boft bat road hra hira glora deft peanut"
).split()


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_the_change_of_each_kind_of_peft(kind: str, tmp_path: Path) -> None:
    made = peft_of(kind, torch.float32)
    (update, *_) = peft_updates(made, SHAPES[made.layer]).values()
    with loratool.open_adapter(made.write(tmp_path / "adapter")) as adapter:
        module = next(iter(adapter.values()))
        if kind == "supertuning" or module.kind in NEEDS_THE_WEIGHT:
            with pytest.raises(InputError, match=f"is {module.kind}: its delta depends on the weight('s size)?\n"):
                module.delta()
        else:
            assert isinstance(update, Add) and close_to(module.delta(), update.change)


def test_experts_are_a_stack(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(4 * 2, 6, generator=g), torch.randn(5, 2 * 4, generator=g)
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["mlp.experts.gate_up_proj"]}'
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    name = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, tmp_path / "a" / "adapter_model.safetensors")
    with loratool.open_adapter(tmp_path / "a") as adapter:
        (module,) = adapter.values()
        wanted = torch.stack([1.5 * B.double()[:, e::4] @ A.double()[2 * e : 2 * e + 2] for e in range(4)])
        assert module.shape == (4, 5, 6) and torch.allclose(module.delta(), wanted, rtol=0, atol=1e-14)


def test_a_model_is_a_mapping_of_tensors() -> None:
    stored = load_file(BASE / "model.safetensors") if (BASE / "model.safetensors").is_file() else {}
    for file in BASE.glob("*.safetensors"):
        stored |= load_file(file)
    with loratool.open_checkpoint(BASE) as model:
        assert repr(model) == f"<llama {BASE}: 30 tensors, 171K parameters, BF16, 343 kB>"
        assert model.keys() == stored.keys() and model.config["model_type"] == "llama" and model.quantized is None
        assert all(torch.equal(model[name], stored[name]) for name in stored)
        assert str(model.specs["model.norm.weight"]) == "BF16 (64,)"
        kept = model["model.norm.weight"]
    assert torch.equal(kept, stored["model.norm.weight"])
    with pytest.raises(UsageError, match="is closed"):
        model["model.norm.weight"]


def test_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "ids": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25),
        "number": torch.tensor(7, dtype=torch.int32),
        "none": torch.zeros(0, 4),
        "no_ids": torch.zeros(3, 0, dtype=torch.int64),
        "float8": torch.tensor([[0.5, -448.0]]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j]),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    with loratool.open_checkpoint(tmp_path / "m.safetensors") as model:
        assert repr(model).startswith(f"<checkpoint {tmp_path / 'm.safetensors'}: 9 tensors, ")
        for name, tensor in tensors.items():
            assert torch.equal(model[name].to(tensor.dtype), tensor) and model[name].shape == tensor.shape, name


def test_codes_are_the_numbers_that_they_mean() -> None:
    with loratool.open_checkpoint(FIXTURES / "llama" / "fp8") as model:
        assert model.quantized == "fp8" and ", fp8, BF16/F32/F8_E4M3, " in repr(model)
        coded = load_file(next((FIXTURES / "llama" / "fp8").glob("*.safetensors")))
        name = f"{Q}.weight"
        size = 16
        scale = coded[f"{name}_scale_inv"].double().repeat_interleave(size, 0).repeat_interleave(size, 1)
        assert torch.equal(model[name], coded[name].double() * scale)
        assert f"{name}_scale_inv" not in model and model.get(f"{name}_scale_inv") is None


def test_what_is_no_adapter_or_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is an adapter, but open_checkpoint opens models"):
        loratool.open_checkpoint(ADAPTER)
    with pytest.raises(InputError):
        loratool.open_adapter(BASE)
    save_file({"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.zeros(4, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(NeedsFlag, match="alpha"):
        loratool.open_adapter(tmp_path / "a.safetensors")
    with loratool.open_adapter(tmp_path / "a.safetensors", alpha=4) as adapter:
        assert adapter["x"].scale == 2


def test_no_torch_before_the_first_tensor() -> None:
    code = (
        f"import sys, loratool; a = loratool.open_adapter({str(ADAPTER)!r})\n"
        f"repr(a), repr(a[{Q!r}]), repr(loratool.open_checkpoint({str(BASE)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(loratool) == sorted(loratool.__all__)
    module = loratool.open_adapter(ADAPTER)[Q]
    assert {name for name in dir(module) if name[0] != "_"} == {
        *("A", "B", "delta", "kind", "name", "rank", "scale", "shape", "tensors")
    }
