"""Hold the guide `undo-format`: a reader that was written from it restores what a merge read, bit for bit."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from conftest import factors, load_model, weights, write_model
from naive_reader import restore
from safetensors.torch import save_file
from torch import Tensor

import loratool

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
    data = (tmp_path / "out" / "loratool.undo").read_bytes()
    told = dict(zip("0123", (numbers(each, rows) for each in (plain, *others, values)), strict=True))
    order = [adapter["name"] for adapter in json.loads(data[int.from_bytes(data[-56:-48], "little") : -56])["adapters"]]
    found = restore(
        data, {name: codes(x) for name, x in load_model(tmp_path / "out").items()}, [told[n] for n in order]
    )
    assert found == {name: codes(x) for name, x in base.items() if name != "same"}
