"""Merge, verify, undo and convert what `fixtures/published` lists: names and shapes of files that others made.

A row's tensors are filled with seeded numbers, at a fraction of their sizes. What a merge must write is computed here
in float64, from the names as the row says: W + s B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, any_widths, load_model, run_command, spread
from lib.files import gguf_bytes
from lib.files.published import Spec, expand, shorten, tensors_of
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.errors import LoratoolError

FOLDER = FIXTURES / "published"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "U8": torch.uint8,
}
FACTORS = (  # the ends of A and B
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora_down.weight", "_lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".down.weight", ".up.weight"),
    (".lora_a.weight", ".lora_b.weight"),
    (".lora_a", ".lora_b"),
    (".lora_A", ".lora_B"),
)
WIDTHS = {
    *("hidden_size", "intermediate_size", "head_dim", "vocab_size", "n_embd", "n_positions", "d_model", "d_kv", "d_ff"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"),
    *("word_embed_proj_dim", "embed_dim", "out_hidden_size", "linear_key_head_dim", "linear_value_head_dim"),
    *("ffn_hidden_size", "kv_channels", "padded_vocab_size", "num_position_embeddings", "r"),
    *(
        "cross_attention_dim",
        "block_out_channels",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    ),
}
LAYERS = {"num_hidden_layers", "n_layer", "num_layers", "n_layers"}
FAMILIES = (
    "sd1",
    "sd2",
    "sdxl",
    "sd3",
    "flux",
    "hunyuan_video",
    "mochi",
    "qwen_image",
    "anima",
    "krea2",
    "z_image",
    "wan",
)


@cache
def rows(file: str) -> dict[str, dict[str, Any]]:
    return json.loads((FOLDER / f"{file}.json").read_text())  # type: ignore[no-any-return]


def smaller(number: int, divide: int) -> int:
    """Return a size, or a rank, in the small copy of a model; what does not divide is kept."""
    return number // divide if number % divide == 0 else number


def small_config(config: Mapping[str, Any], divide: int, layers: int) -> dict[str, Any]:
    def value(key: str, old: Any) -> Any:
        if key == "group_size" and "quant_method" in config:  # there are as many groups as in the large model
            return old // divide
        if isinstance(old, dict):
            return small_config(old, divide, layers) if key.endswith("_config") else old
        if isinstance(old, list):
            old = [value(key, each) for each in old]
            return old[:layers] if key == "layer_types" else old
        if isinstance(old, int) and not isinstance(old, bool):
            return smaller(old, divide) if key in WIDTHS else min(old, layers) if key in LAYERS else old
        return old

    return {key: value(key, old) for key, old in config.items()}


def small_tensors(row: Mapping[str, Any], divide: int, layers: int) -> dict[str, Spec]:
    """Return the tensors of the first layers at their small sizes."""
    made = {}
    for name, (dtype, shape) in tensors_of(row["tensors"]).items():
        number = re.search(r"[._](\d+)[._]", name)
        if number is None or int(number[1]) < layers:
            made[name] = (dtype, tuple(d if d in row.get("kept", ()) else smaller(d, divide) for d in shape))
    return made


def filled(tensors: Mapping[str, Spec], size: float, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, (key, shape) in tensors.items():
        dtype = DTYPES[key]
        if name.endswith((".qweight", ".qzeros")):  # 4 bits; AutoGPTQ stores a zero point less 1, and none of 16
            nibbles = torch.randint(0, 15, (*shape, 8), generator=g, dtype=torch.int32)
            made[name] = (nibbles << torch.arange(0, 32, 4)).sum(-1).int()
        elif name.endswith(".g_idx"):
            groups = tensors[name.replace("g_idx", "scales")][1][0]
            made[name] = torch.arange(groups, dtype=dtype).repeat_interleave(shape[0] // groups)
        elif dtype.is_floating_point:
            numbers = torch.randn(shape, generator=g) * size
            made[name] = (numbers if shape else numbers.abs() + 1).to(dtype)
        else:
            most = {"BOOL": 2, "U32": 2**32}.get(key, 9)
            made[name] = torch.randint(1, most, shape, generator=g).to(dtype)
    return made


def in_nf4(row: Mapping[str, Any], shapes: Mapping[str, Spec], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a small model's tensors with bitsandbytes' codes of 4 bits, which are flat, for those of these shapes."""
    g = torch.Generator().manual_seed(4)
    for name in tensors_of(row["tensors"]):
        if f"{name}.absmax" not in made:
            continue
        shape = shapes[name][1]
        count = shape[0] * shape[1]
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
        made[name] = torch.randint(0, 256, (count // 2, 1), generator=g, dtype=torch.uint8)
        made[f"{name}.absmax"] = torch.rand(count // 64, generator=g) * 0.1 + 0.01
        made[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
        made[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    return made


def written(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gguf":
        gguf_bytes.write(path, metadata, {name: gguf_bytes.floats(each.numpy()) for name, each in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(dict(tensors), path, metadata=dict(metadata) or None)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(dict(tensors), path)


def write_base(name: str, folder: Path) -> tuple[Path, dict[str, Tensor], int, int]:
    """Write a small model; return its path, its tensors, the divisor of its sizes and its layers."""
    row = rows("models")[name]
    divide, layers = row.get("divide", 32), row.get("layers", 1000)
    tensors = filled(small_tensors(row, divide, layers), 0.05, 1)
    if "plain" in row:
        tensors = in_nf4(row, small_tensors(rows("models")[row["plain"]], divide, layers), tensors)
    file = row.get("file", "model.safetensors")
    written(folder / file, tensors, {"format": "pt"})
    if "config" not in row:
        return folder / file, tensors, divide, layers
    (folder / "config.json").write_text(json.dumps(small_config(row["config"], divide, layers)))
    return folder, tensors, divide, layers


def write_adapter(name: str, divide: int, layers: int, folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    row = rows("adapters")[name]
    tensors = filled(small_tensors(row, divide, layers), 0.1, 2)
    file = folder / row["file"]
    written(file, tensors, row.get("fields") or row.get("metadata", {}))
    if "config" not in row:
        return file, tensors, {}
    config = small_config(row["config"], divide, 1000)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, tensors, config


def scale_of(row: Mapping[str, Any], config: Mapping[str, Any], alpha: Tensor | None, rank: int) -> float:
    if alpha is not None:
        return float(alpha) / rank
    if isinstance(config.get("config"), dict):  # AdapterHub's
        return float(config["config"]["alpha"]) / rank
    if "lora_parameters" in config:
        return float(config["lora_parameters"]["scale"])
    if "fields" in row:
        return float(row["fields"]["adapter.lora.alpha"]) / rank
    if "lora_alpha" in config:
        return float(config["lora_alpha"]) / (sqrt(rank) if config.get("use_rslora") else rank)
    return float(row["alpha"]) / rank if "alpha" in row else float(row["scale"])


def changes(row: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield (name in the base, change, DoRA's magnitude) of each module, and (name, None, value) of other tensors."""
    if "numbered" in row:
        yield from _numbered(row, tensors)
        return
    used = set()
    for name, A in tensors.items():
        if re.search(row.get("dropped", r"^\b$"), name):
            used.add(name)
            continue
        if name.endswith(".lokr_w1"):  # both factors complete: LyCORIS takes its alpha for the rank
            module = name.removesuffix(".lokr_w1")
            used |= {name, f"{module}.lokr_w2", f"{module}.alpha"}
            yield f"{named(row, module)}.weight", torch.kron(A.double(), tensors[f"{module}.lokr_w2"].double()), None
        if name.endswith(".hada_w1_a"):
            module = name.removesuffix(".hada_w1_a")
            used |= {each for each in tensors if each.startswith(f"{module}.")}
            yield f"{named(row, module)}.weight", _hadamard(module, tensors), None
        for down, up in FACTORS:
            if not name.endswith(down):
                continue
            module = name.removesuffix(down)
            B = tensors[module + up].double()
            alpha, magnitude = tensors.get(f"{module}.alpha"), tensors.get(f"{module}.dora_scale")
            of_peft = tensors.get(f"{module}.lora_magnitude_vector")
            magnitude = magnitude if of_peft is None else of_peft.unsqueeze(1)
            used |= {name, module + up, *(f"{module}.{x}" for x in ("alpha", "dora_scale", "lora_magnitude_vector"))}
            if down == ".lora_a" and "fields" not in row:  # MLX: (in, r), (r, out)
                A, B = A.T, B.T
            if "experts" in row and ".experts" in module:
                yield from _of_experts(row, config, module, A.double(), B)
                break
            rank = A.shape[0]
            if enabled := config.get("enable_lora") or row.get("enabled"):
                change = _merged_linear(A.double(), B, enabled)
                rank //= sum(enabled)
            else:
                change = torch.einsum("or,ri->oi", B.flatten(1), A.double().flatten(1))
                change = change.reshape(B.shape[0], *A.shape[1:])
            scale = scale_of(row, config, alpha, rank)
            change *= scale
            if up == ".lora_B.weight" and f"{module}.lora_B.bias" in tensors:
                used.add(f"{module}.lora_B.bias")
                yield f"{named(row, module)}.bias", scale * tensors[f"{module}.lora_B.bias"].double(), None
            target = named(row, module)
            target = target if target.endswith("]") else f"{target}.weight"
            yield target, change.T if row.get("transposed") else change, magnitude
            break
    for name, tensor in tensors.items():
        if name not in used:
            yield named(row, name), None, tensor


def _numbered(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield the changes of numbered pairs: of q and of v of each layer in turn, a third of the rows each."""
    for n in range(len(tensors) // 2):
        change = tensors[f"w_b_{n:03d}"].double() @ tensors[f"w_a_{n:03d}"].double()
        yield f"{row['numbered'].format(n // 2)}[{2 * (n % 2)}/3]", change, None


def _hadamard(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the change of LyCORIS's LoHa, with cores for kernels (`loha.py`: HadaWeight, HadaWeightTucker)."""
    w1_a, w1_b, w2_a, w2_b = (tensors[f"{module}.hada_{each}"].double() for each in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = float(tensors[f"{module}.alpha"]) / len(w1_b)
    if f"{module}.hada_t1" not in tensors:
        return (w1_a @ w1_b) * (w2_a @ w2_b) * scale
    t1, t2 = (tensors[f"{module}.hada_t{each}"].double() for each in "12")
    one, two = (torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, b, a in ((t1, w1_b, w1_a), (t2, w2_b, w2_a)))
    return one * two * scale


def _merged_linear(A: Tensor, B: Tensor, enabled: list[bool]) -> Tensor:
    """Return the change of loralib's MergedLinear: a group of A and B for each enabled part, zeros for the others."""
    count = sum(enabled)
    parts = iter([b.flatten(1) @ a for a, b in zip(A.chunk(count), B.chunk(count), strict=True)])
    rows_of_one = B.shape[0] // count
    return torch.cat([next(parts) if each else torch.zeros(rows_of_one, A.shape[1]) for each in enabled]).double()


def _of_experts(row: Mapping[str, Any], config: Mapping[str, Any], module: str, A: Tensor, B: Tensor) -> Iterator[Any]:
    """Yield the changes of single experts: PEFT's factors of a stack of them, (E r, in) and (out, r E)."""
    count, rank = row["experts"], A.shape[0] // row["experts"]
    change = torch.einsum("ore,eri->eio", B.reshape(len(B), rank, count), A.reshape(count, rank, -1))
    change *= scale_of(row, config, None, rank)
    experts = named(row, module.removesuffix(".base_layer"))
    for e in range(count):
        if module.endswith(".base_layer"):  # gate_up_proj; the other wrapper is down_proj
            gate, up = change[e].chunk(2)
            yield f"{experts}.{e}.gate_proj.weight", gate, None
            yield f"{experts}.{e}.up_proj.weight", up, None
        else:
            yield f"{experts}.{e}.down_proj.weight", change[e], None


def named(row: Mapping[str, Any], name: str) -> str:
    for pattern, new in row.get("modules", []):
        name = re.sub(pattern, new, name)
    return name


def assert_nearest(X: Tensor, stored: Tensor, name: str, slack: float = 0.0) -> None:
    """Hold that each stored number is as near to X as the nearest number of its dtype."""
    nearest = (X.to(stored.dtype).double() - X).abs()
    off = (stored.double() - X).abs()
    limit = nearest * (1 + 1e-6) + 1e-15 * X.abs().max() + slack * X.abs().max() * torch.finfo(stored.dtype).eps
    worst = (off - limit).max()
    assert worst <= 0, f"{name}: {int((off > limit).sum())} of {X.numel()} numbers are not the nearest"


def hold(
    expected: Mapping[str, Tensor], base: Mapping[str, Tensor], merged: Mapping[str, Tensor], slack: float = 0.0
) -> None:
    assert set(merged) == set(base) | set(expected), set(merged) ^ (set(base) | set(expected))
    for name, tensor in merged.items():
        if name in expected:
            assert_nearest(expected[name], tensor, name, slack)
        else:
            assert tensor.dtype == base[name].dtype and torch.equal(tensor, base[name]), name


def expectation(
    row: Mapping[str, Any], base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, change, value in changes(row, tensors, config):
        if change is None and name.endswith((".diff", ".diff_b")):
            target = (
                name.removesuffix(".diff_b") + ".bias"
                if name.endswith("_b")
                else name.removesuffix(".diff") + ".weight"
            )
            made[target] = base[target].double() + value.double()
        elif change is None:
            made[name] = value.double()
        else:
            name, rows_of_it = _rows(name, base)
            X = made.setdefault(name, base[name].double())
            if "widen" in row.get("options", {}).values() and change.dim() == 2 and change.shape[1] > X.shape[1]:
                X = made[name] = torch.nn.functional.pad(X, (0, change.shape[1] - X.shape[1]))
            assert change.shape == X[rows_of_it].shape, (name, change.shape, X[rows_of_it].shape)
            X[rows_of_it] += change
        if change is not None and value is not None:  # DoRA: the norm over the dimensions in which its magnitude is 1
            over = [i for i, d in enumerate(value.shape) if d == 1]
            made[name] *= value.double() / made[name].norm(dim=over, keepdim=True)
    return made


def _rows(name: str, base: Mapping[str, Tensor]) -> tuple[str, slice]:
    """Return the rows that a name stands for: `x.weight[1/3]` is the second third, `x.weight[3-7/7]` the last four."""
    found = re.fullmatch(r"(.*)\[(\d+)(?:-(\d+))?/(\d+)\]", name)
    if found is None:
        return name, slice(None)
    first, parts = int(found[2]), int(found[4])
    one = len(base[found[1]]) // parts
    return found[1], slice(first * one, int(found[3] or first + 1) * one)


def adapters() -> list[str]:
    return [*rows("adapters")]


@pytest.mark.parametrize("name", spread(adapters(), 3))
def test_adapter(name: str, tmp_path: Path) -> None:
    row = rows("adapters")[name]
    with any_widths(*FAMILIES):
        base, W, divide, layers = write_base(row["base"], tmp_path / "base")
        adapter, tensors, config = write_adapter(name, divide, layers, tmp_path / "adapter")
        if "refused" in row:
            with pytest.raises(LoratoolError, match=row["refused"]):
                loratool.merge(base, adapter, tmp_path / "out", **row.get("options", {}))
            return
        options = {"alpha": row["alpha"]} if "alpha" in row else {}
        assert run_command("inspect", adapter, *(["--alpha", row["alpha"]] if options else [])).exit_code == 0
        expected = expectation(row, W, tensors, config)
        suffix = ".safetensors" if base.is_file() else ""
        out, back = tmp_path / f"out{suffix}", tmp_path / f"back{suffix}"
        selected = row.get("options", {})
        loratool.merge(base, adapter, out, **options, **selected)
        hold(expected, W, load_model(out))
        selected = {key: value for key, value in selected.items() if key != "allow"}  # of merge alone
        assert loratool.verify(base, adapter, out, **options, **selected).ok
        loratool.unmerge(out, adapter, back, **options, **selected)
        hold({}, W, load_model(back))
        for to in row.get("to", []):
            end = {"gguf": ".gguf", "peft": "", "mlx": ""}.get(to, ".safetensors")
            other, again = tmp_path / f"{to}{end}", tmp_path / f"merged-{to}{suffix}"
            given, more = ({}, {"alpha": config["lora_alpha"]}) if to == "loralib" else ({"base": base}, {})
            loratool.convert(adapter, other, to=to, **given, **options)
            loratool.merge(base, other, again, undo=False, **more)
            hold(expected, W, load_model(again), slack=1.0)


COMPANIONS = ("scales", "biases", "qweight", "qzeros", "g_idx")  # MLX's first two, then GPTQ's and AWQ's
OF_NF4 = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")  # bitsandbytes', after the weight's name


def companions(weight: str) -> list[str]:
    """Return the names of the tensors that a quantized weight may have."""
    return [*(weight.removesuffix("weight") + each for each in COMPANIONS), *(weight + each for each in OF_NF4)]


def _nibbles(words: Tensor, order: list[int]) -> Tensor:
    """Return the codes of 4 bits of each word in a last dimension; the k-th from the lowest bit comes at order[k]."""
    codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return codes[..., [order.index(k) for k in range(8)]]


def _of_words(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a weight in 4 bits: AutoGPTQ's has words of inputs, AutoAWQ's of outputs in the order of its kernel."""
    words, zeros, scales = (tensors[f"{module}{each}"] for each in ("qweight", "qzeros", "scales"))
    order = [*range(8)] if f"{module}g_idx" in tensors else [0, 2, 4, 6, 1, 3, 5, 7]
    zero = _nibbles(zeros, order).flatten(1).double()  # (groups, out)
    codes = _nibbles(words, order)
    if f"{module}g_idx" in tensors:
        zero += 1
        codes = codes.transpose(1, 2)
    codes = codes.reshape(-1, zero.shape[1]).double()  # (in, out)
    group = torch.arange(len(codes)) * len(scales) // len(codes)
    return ((codes - zero[group]) * scales.double()[group]).T


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors, those in MLX's affine codes as scale * code + bias for each group of 64 numbers of a row."""
    made = {}
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            module = name.removesuffix("qweight")
            made[f"{module}weight"] = _of_words(module, tensors)
        if name.endswith((*(f".{each}" for each in COMPANIONS), *OF_NF4)):
            continue
        made[name] = tensor
        if f"{name}.absmax" in tensors:  # the first number of a byte is in its high bits
            codes = torch.cat([tensor >> 4, tensor & 15], 1).flatten().int()
            by = tensors[f"{name}.absmax"].double().repeat_interleave(64)
            shape = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))["shape"]
            made[name] = (tensors[f"{name}.quant_map"].double()[codes] * by).reshape(shape)
        if tensor.dtype == torch.uint32:
            scales, biases = (tensors[each].double().repeat_interleave(64, 1) for each in companions(name)[:2])
            bits = tensor.shape[1] * 32 // scales.shape[1]
            stream = np.unpackbits(tensor.numpy().view(np.uint8), axis=1, bitorder="little")
            codes = stream.reshape(len(stream), -1, bits) @ (1 << np.arange(bits))
            made[name] = scales * torch.from_numpy(codes) + biases
    return made


def published_models() -> list[str]:
    return [name for name, row in rows("models").items() if row.get("listed", "from config.json" in row["shapes"])]


@pytest.mark.parametrize("name", spread(published_models(), 2))
def test_checkpoint(name: str, tmp_path: Path) -> None:
    """Change each matrix of a layer by an adapter with the names that PEFT gives its class."""
    row = rows("models")[name]
    base, W, _, _ = write_base(name, tmp_path / "base")
    assert run_command("inspect", base).exit_code == 0
    factors, expected, numbers = {}, {}, dequantized(W)
    g = torch.Generator().manual_seed(3)
    for weight, tensor in numbers.items():
        if re.search(r"[._]\d+[._].*\.weight$", weight) is None or tensor.dim() != 2:
            continue
        module = weight.removesuffix(".weight")
        for old, new in row.get("modules", []):
            if module.startswith(old):
                module = new + module.removeprefix(old)
                break
        A, B = (torch.randn(shape, generator=g) * 0.1 for shape in ((2, tensor.shape[1]), (tensor.shape[0], 2)))
        factors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        expected[weight] = tensor.double() + 1.5 * B.double() @ A.double()
    written(tmp_path / "adapter" / "adapter_model.safetensors", factors, {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, tmp_path / "adapter", out)
    codes = {name for weight in expected for name in companions(weight) if name in W}
    hold(expected, {name: tensor for name, tensor in W.items() if name not in codes}, load_model(out))
    assert loratool.verify(base, tmp_path / "adapter", out).ok
    loratool.unmerge(out, tmp_path / "adapter", back)
    hold({}, W, load_model(back))
    loratool.convert_model(base, tmp_path / "wide", dtype="fp32")
    wide = load_model(tmp_path / "wide")
    assert set(wide) == set(numbers)
    for weight, tensor in numbers.items():
        assert torch.equal(wide[weight], tensor.float() if tensor.is_floating_point() else tensor), weight


def test_templates() -> None:
    """Each row's templates are what `shorten` makes of its names, and no two of them share a name."""
    for file in ("models", "adapters"):
        for name, row in rows(file).items():
            tensors = tensors_of(row["tensors"])
            again = shorten(tensors)
            assert tensors_of({k: (dtype, [*shape]) for k, (dtype, shape) in again.items()}) == tensors, name
    assert expand("h.{0..2,5}.{q,k}_proj") == [f"h.{i}.{x}_proj" for i in (0, 1, 2, 5) for x in "qk"]
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 1_000_000
