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
from lib.files import gguf_bytes
from lib.files.ggml_blocks import blocks_of
from lib.models.undo_models import write_deeper
from lib.oracles.naive_undo_reader import Coded, restore
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.scaled import ScaledCodes
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES
from loratool.numerics.code_levels import Integers, Table

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


def read_back(
    out: Path, merged: dict[str, list[int]], told: dict[str, Any], coded: Any = None, sizes: Any = None
) -> dict[str, Any]:
    """Restore a merge; told: of the adapters, by the names of their folders."""
    data = (out / "loratool.undo").read_bytes()
    index = json.loads(data[int.from_bytes(data[-56:-48], "little") : -56])
    return restore(data, merged, [told[adapter["name"]] for adapter in index["adapters"]], coded, sizes)


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


def test_it_restores_the_layers_that_a_model_repeats(tmp_path: Path) -> None:
    folder = write_deeper(tmp_path)
    loratool.merge(folder / "base", folder / "adapter", tmp_path / "out")
    tensors = load_model(folder / "adapter/adapter_model.safetensors")
    factors = numbers({name.removeprefix(PREFIX): x for name, x in tensors.items()}, {})
    told = {"adapter": {module: {**each, "scale": Fraction(1)} for module, each in factors.items()}}
    merged, base = ({name: codes(x) for name, x in load_model(tmp_path / each).items()} for each in ("out", "base"))
    changed = "model.layers.0.x.weight"  # the other layer has a copy without an update
    assert read_back(tmp_path / "out", merged, told) == {changed: base[changed]}


# The numbers of codes before scale and zero point, by the formats' definitions; of other formats their codecs tell them
E2M1 = [sign * x for sign in (1.0, -1.0) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
LEVELS: dict[str, list[float]] = {
    "fp8": torch.arange(256, dtype=torch.uint8).view(E4M3).double().tolist(),
    "ct_mxfp4": E2M1,
    "awq_gemm": [float(code) for code in range(16)],
    "gptq_v1_4bit_act_order": [float(code) for code in range(16)],
    "ct_pack3_channel_ragged": [float(code) for code in range(-4, 4)],
}
VECTORS: dict[str, dict[str, Any]] = json.loads((FIXTURES / "coded" / "index.json").read_text())["vectors"]
REFUSED = ("gptq_v1_4bit_wrap", "mxfp4_gpt_oss", "fp4_deepseek_v4", "mlx_affine4_experts")  # or with stacks alone
K, V = (f"model.layers.0.self_attn.{each}_proj" for each in "kv")


def write_coded(vector: str, folder: Path) -> Path:
    """Write a base of codes: part of a model of blocks of e4m3, or a vector, with a plain tensor that says its type."""
    path = FIXTURES / ("llama/fp8/model.safetensors" if vector == "fp8" else f"coded/{vector}.safetensors")
    with safe_open(path, "pt") as file:
        known, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if vector == "fp8":
        known = {name: x for name, x in known.items() if name.startswith((K, V))}
        known[f"{K}.weight"].view(torch.uint8)[0, :4] = torch.tensor([128, 127, 255, 0])  # -0, both nan, 0
        known[f"{K}.weight_scale_inv"][1, 1] = 0.0
    config = VECTORS[vector]["config"] if vector in VECTORS else json.loads((path.parent / "config.json").read_text())
    known["model.norm.weight"] = weights(8, dtype=BF16)
    write_model(folder, known, {"model_type": "llama", "dtype": "bfloat16", **config}, metadata=metadata or {})
    for name, content in VECTORS.get(vector, {}).get("side_files", {}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def read_codes(base: Checkpoint, name: str) -> list[int]:
    parts = base.parts_of(name)
    matrices, rows, _ = parts.shape
    return [int(code) for code in parts.weight.format.codes(parts, 0, matrices * rows).reshape(-1)]


def told_of_codes(base: Checkpoint, name: str, known: list[float] | None) -> Coded:
    """Return what the reader is told of a coded weight, with the numbers that its codec gives each code everywhere."""
    parts = base.parts_of(name)
    codec, rows = parts.weight.format, parts.shape[0] * parts.shape[1]
    assert isinstance(codec, ScaledCodes)
    levels, near = dict(enumerate(known or ())), range(len(known or ()))
    if known is None:
        own, kind = codec.levels(parts), np.dtype(codec.code)
        assert isinstance(own, (Integers, Table))
        near = range(own.low, own.high + 1) if isinstance(own, Integers) else range(len(own.numbers))
        every = range(-128, 128) if codec.code == "int8" else near  # a byte may have more than integers of 4 bits
        levels = {code: float(own.values(np.array([code], kind))[0]) for code in every}
    each = [codec.values(parts, 0, np.full((rows, parts.shape[2]), code, codec.code)) for code in near]
    table = [[dict(zip(near, place, strict=True)) for place in row] for row in np.stack(each, axis=2).tolist()]
    return Coded(levels, table, codec.width(parts), codec.key == "bitsandbytes-4bit", codec.key == "ggml")


# One weight of those that `LEVELS` has, beside others that become numbers with it; of the others all that are small
QUICK = [("fp8", "dequantize"), *((vector, way) for vector in LEVELS for way in ("mixed", "requantize"))]
SLOW = [(vector, way) for vector in VECTORS.keys() - {*LEVELS, *REFUSED} for way in ("mixed", "requantize")]


@pytest.mark.parametrize(
    ("vector", "way"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in sorted(SLOW))]
)
def test_it_restores_codes(vector: str, way: str, tmp_path: Path) -> None:
    base = open_checkpoint(write_coded(vector, tmp_path / "base"))
    is_quick, dora = (vector, way) in QUICK, vector == "awq_gemm"
    changed: dict[str, Tensor] = {}
    for name in base.weights:
        W = base[name].nan_to_num()
        if W.dim() == 2 and W.numel() < 9000 and W.abs().max() < 1e38 and not (is_quick and changed):
            changed[name] = W
    adapter: dict[str, Tensor] = {}
    for name, W in changed.items():
        module, size = name.removesuffix(".weight"), 2.0 * float(W.abs().median() + 1e-6)
        adapter |= lora(module, (W.shape[0], W.shape[1]), size)
        adapter |= {f"{module}.lora_magnitude_vector": weights(len(W)).abs() + 1.0} if dora else {}
    folder = write_adapter(tmp_path / "0", adapter, use_dora=dora)
    loratool.merge(tmp_path / "base", folder, tmp_path / "out", quantized=way, allow=["lossy"])
    out = open_checkpoint(tmp_path / "out")
    plain = [name for name in base.weights if name not in out.weights]
    assert way == "requantize" or len(plain) >= len(changed)
    gone, stored = plain or list(changed), load_model(tmp_path / "base")
    merged = {name: codes(out[name]) if name in plain else read_codes(out, name) for name in gone}
    coded = {name: told_of_codes(base, name, LEVELS.get(vector)) for name in gone}
    expected: dict[str, Any] = {name: read_codes(base, name) for name in gone}
    companions = [tensor for name in plain for tensor in base.weights[name].tensors[1:]]
    expected |= {name: bytes(stored[name].reshape(-1).view(torch.uint8).numpy()) for name in companions}
    found = read_back(tmp_path / "out", merged, {"0": numbers(adapter, {})}, coded)
    assert found == expected
    base.close()
    out.close()


@pytest.mark.parametrize("way", ["mixed", "requantize"])
@pytest.mark.parametrize("kind", ["Q5_1", "Q8_0", "IQ4_XS"])
def test_it_restores_the_blocks_of_a_gguf_file(kind: str, way: str, tmp_path: Path) -> None:
    numbers_of, _ = BLOCK_TYPES[kind]
    name, columns = "blk.0.attn_q.weight", max(64, numbers_of)
    A, B = factors(3, columns, 2)
    pair = {f"{name}.lora_a": gguf_bytes.floats(A.numpy()), f"{name}.lora_b": gguf_bytes.floats(8 * B.numpy())}
    blocks = blocks_of(kind, 3 * columns // numbers_of).tobytes()
    coded = {name: gguf_bytes.tensor(GGML_TYPES[kind][0], (3, columns), blocks)}
    own = {"general.architecture": "llama"}
    lone = {**own, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    base, adapter = gguf_bytes.write(tmp_path / "b.gguf", own, coded), gguf_bytes.write(tmp_path / "a.gguf", lone, pair)
    loratool.merge(base, adapter, tmp_path / "out", quantized=way, allow=["lossy"])
    one, out = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    merged = {name: read_codes(out, name) if out.weights else codes(out[name])}
    told = {"a.gguf": {"blk.0.attn_q": {"scale": Fraction(2), "A": fractions(A), "B": fractions(8 * B)}}}
    found = read_back(tmp_path / "out", merged, told, {name: told_of_codes(one, name, None)}, {name: len(blocks)})
    assert found == {name: read_codes(one, name)}
    one.close()
    out.close()
