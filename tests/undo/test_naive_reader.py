"""Hold the guide `undo-format`: a reader that was written from it restores what a merge read, bit for bit."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model
from naive_reader import Coded, restore
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat

PREFIX = "base_model.model."
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
E4M3 = torch.float8_e4m3fn


def codes(x: Tensor) -> list[int]:
    data, size = bytes(x.contiguous().view(-1).view(torch.uint8).numpy()), x.itemsize
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def fractions(x: Tensor) -> list[Any]:
    return [[Fraction(number) for number in row] for row in x.reshape(len(x), -1).double().tolist()]


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def lora(module: str, shape: tuple[int, int], size: float, seed: int = 0) -> dict[str, Tensor]:
    A, B = factors(*shape, 2, seed)
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B * size}


def numbers(tensors: dict[str, Tensor], rows: dict[str, list[int]]) -> dict[str, Any]:
    """Return what the reader is told of an adapter: factors, magnitudes, and rows of values, as fractions."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module, _, role = name.rpartition(".lora_") if ".lora_" in name else (name, "", "")
        if role:
            own = found.setdefault(module, {"scale": Fraction(3, 2)})
            own |= {"m": [row[0] for row in fractions(tensor)]} if "mag" in role else {role[0]: fractions(tensor)}
        elif "trainable" in name:
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            found[module] = {"rows": dict(zip(rows[module], fractions(tensor), strict=True))}
        else:
            found[PREFIX + name] = {"rows": dict(enumerate(fractions(tensor)))}
    return found


def hard(x: Tensor) -> Tensor:
    """Put zeros of both signs, inf or nan, a power of two and the least number among weights."""
    odd = torch.nan if x.dtype == E4M3 else torch.inf
    x[0, :5] = torch.tensor([0.0, -0.0, odd, 0.25, torch.finfo(x.dtype).smallest_normal * 2.0**-7], dtype=x.dtype)
    return x


def read_back(out: Path, merged: dict[str, list[int]], told: dict[str, Any], coded: Any = None) -> dict[str, Any]:
    """Restore a merge; told: of the adapters, by the names of their folders."""
    data = (out / "loratool.undo").read_bytes()
    index = json.loads(data[int.from_bytes(data[-56:-48], "little") : -56])
    return restore(data, merged, [told[adapter["name"]] for adapter in index["adapters"]], coded)


def test_a_reader_that_was_written_from_the_guide(tmp_path: Path) -> None:
    types = {"b": BF16, "h": FP16, "s": torch.float32, "w": FP64, "e": E4M3, "f": torch.float8_e5m2}
    base = {f"{name}.weight": hard(weights(4, 6, dtype=dtype)) for name, dtype in types.items()}
    base |= {"d.weight": weights(4, 6, dtype=BF16), "both.weight": weights(6, 4, dtype=BF16)}
    base |= {"norm.weight": weights(5, dtype=FP16), "tokens.weight": weights(6, 3, dtype=BF16)}
    base |= {"value.weight": weights(70, 80, dtype=BF16), "same": weights(3)}
    model = write_model(tmp_path / "base", base, {"model_type": "x"})
    rows = {"tokens": [4, 1], "both": [5, 0]}
    plain = {
        key: x
        for name, size in zip("bhswef", (9.0, 30.0, 1.0, 2.0, 3.0, 9.0), strict=True)
        for key, x in lora(name, (4, 6), size).items()
    }
    plain |= {"norm.weight": weights(5, seed=3), "tokens.token_adapter.trainable_tokens_delta": weights(2, 3, seed=9)}
    plain |= {"both.token_adapter.trainable_tokens_delta": weights(2, 4, seed=9)}
    magnitude = {"d.lora_magnitude_vector": weights(4).abs() + 0.1}
    others = {**lora("d", (4, 6), 5.0), **magnitude}, {**lora("b", (4, 6), 1 / 3, 7), **lora("both", (6, 4), 4.0)}
    values = {"value.weight": weights(70, 80, seed=4)}
    adapters = [
        (write_adapter(tmp_path / "0", plain, trainable_token_indices=rows), 0.75),
        (write_adapter(tmp_path / "1", others[0], use_dora=True), 0.5),
        (write_adapter(tmp_path / "2", others[1]), -1 / 3),
        (write_adapter(tmp_path / "3", values), 1.0),
    ]
    loratool.merge(model, adapters, tmp_path / "out")
    told = dict(zip("0123", (numbers(each, rows) for each in (plain, *others, values)), strict=True))
    found = read_back(tmp_path / "out", {name: codes(x) for name, x in load_model(tmp_path / "out").items()}, told)
    assert found == {name: codes(x) for name, x in base.items() if name != "same"}


# The numbers of codes before scale and zero point, by the formats' definitions
E2M1 = [sign * x for sign in (1.0, -1.0) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
LEVELS: dict[str, list[float]] = {
    "fp8": torch.arange(256, dtype=torch.uint8).view(E4M3).double().tolist(),
    "ct_mxfp4": E2M1,
    "awq_gemm": list(range(16)),
    "gptq_v1_4bit_act_order": list(range(16)),
    "ct_pack3_channel_ragged": list(range(-4, 4)),
}
Q, K, V = (f"model.layers.0.self_attn.{each}_proj" for each in "qkv")


def write_coded(vector: str, folder: Path) -> Path:
    """Write a base of codes: part of a model of blocks of e4m3, or a vector, with a plain tensor that says its type."""
    source = FIXTURES / ("llama/fp8/model.safetensors" if vector == "fp8" else f"coded/{vector}.safetensors")
    known = load_file(source)
    config = json.loads((FIXTURES / "coded" / "index.json").read_text())["vectors"].get(vector, {}).get("config")
    if vector == "fp8":
        config = json.loads((source.parent / "config.json").read_text())
        known = {name: x for name, x in known.items() if name.startswith((K, V))}
        known[f"{K}.weight"].view(torch.uint8)[0, :4] = torch.tensor([128, 127, 255, 0])  # -0, both nan, 0
        known[f"{K}.weight_scale_inv"][1, 1] = 0.0
    known = {name: x for name, x in known.items() if "down_proj" not in name}
    return write_model(folder, known | {"model.norm.weight": weights(8, dtype=BF16)}, {"model_type": "llama", **config})


def read_codes(base: Checkpoint, name: str) -> list[int]:
    parts = base.parts_of(name)
    codec, (_, rows, _) = parts.weight.codec, parts.shape
    assert isinstance(codec, CodeFormat)
    return [int(code) for code in codec.codes(parts, 0, rows).reshape(-1)]


def told_of_codes(base: Checkpoint, name: str, levels: list[float]) -> Coded:
    """Return what the reader is told of a coded weight, with the numbers that its codec gives each code everywhere."""
    parts = base.parts_of(name)
    codec, (_, rows, _) = parts.weight.codec, parts.shape
    assert isinstance(codec, CodeFormat)
    width, count = codec.width(parts), len(levels)
    each = [codec.values(parts, 0, np.full((rows, width), code, codec.code)) for code in range(count)]
    places = np.stack(each, axis=2).tolist()
    table = [[dict(enumerate(values)) for values in row] for row in places]
    return Coded(dict(enumerate(levels)), table, width, codec.key == "bitsandbytes-4bit")


@pytest.mark.parametrize(
    ("vector", "way"),
    [("fp8", "dequantize"), *((vector, way) for vector in LEVELS for way in ("mixed", "requantize"))],
)
def test_it_restores_codes(vector: str, way: str, tmp_path: Path) -> None:
    base = open_checkpoint(write_coded(vector, tmp_path / "base"))
    changed = K if f"{K}.weight" in base.weights else Q
    size, dora = 2.0 * float(base[f"{changed}.weight"].nan_to_num().abs().median()), vector == "awq_gemm"
    shape = base.specs[f"{changed}.weight"].shape
    adapter = lora(changed, (shape[0], shape[1]), size)
    adapter |= {f"{changed}.lora_magnitude_vector": weights(shape[0]).abs() + 1.0} if dora else {}
    folder = write_adapter(tmp_path / "0", adapter, use_dora=dora)
    loratool.merge(tmp_path / "base", folder, tmp_path / "out", quantized=way, allow=["lossy"])
    out = open_checkpoint(tmp_path / "out")
    merged = {n: read_codes(out, n) if n in out.weights else codes(out[n]) for n in out.specs}
    coded = {name: told_of_codes(base, name, LEVELS[vector]) for name in base.weights}
    gone = [f"{changed}.weight"] if way == "requantize" else list(base.weights)  # q, k and v are of one kind
    expected: dict[str, Any] = {name: read_codes(base, name) for name in gone}
    if way != "requantize":
        stored = load_model(tmp_path / "base")
        companions = [tensor for name in gone for tensor in base.weights[name].tensors[1:]]
        expected |= {name: bytes(stored[name].reshape(-1).view(torch.uint8).numpy()) for name in companions}
    assert read_back(tmp_path / "out", merged, {"0": numbers(adapter, {})}, coded) == expected
    base.close()
    out.close()
