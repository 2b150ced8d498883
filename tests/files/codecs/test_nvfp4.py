"""Hold nvfp4 of compressed-tensors and of modelopt against their formulas in fractions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from lib.files.one_weight import codec_of, numbers, only, random_bytes, stored
from torch import Tensor

from loratool import InputError

E2M1 = [Fraction(x) for x in ("0", "0.5", "1", "1.5", "2", "3", "4", "6")]

F8 = torch.float8_e4m3fn


def scales(*shape: int) -> Tensor:
    seeded = torch.Generator().manual_seed(1)
    return (torch.rand(*shape, generator=seeded) * 400).to(F8)


def compressed(whole: float = 3.7) -> dict[str, Tensor]:
    return {
        "x.weight_packed": random_bytes(3, 16),
        "x.weight_scale": scales(3, 2),
        "x.weight_global_scale": torch.tensor([whole]),
    }


def modelopt(whole: float = 3.7) -> dict[str, Tensor]:
    codes, scale, second = compressed(whole).values()
    return {"x.weight": codes, "x.weight_scale": scale, "x.weight_scale_2": second[0]}


def products(tensors: dict[str, Tensor]) -> list[list[Fraction]]:
    """Codes times scales of blocks, which float64 holds."""
    codes, scale = list(tensors.values())[:2]
    wide = scale.double()
    nibbles = [[int(codes[i, j // 2]) >> 4 * (j % 2) & 15 for j in range(32)] for i in range(3)]
    return [
        [(-1 if n & 8 else 1) * E2M1[n & 7] * Fraction(float(wide[i, j // 16])) for j, n in enumerate(row)]
        for i, row in enumerate(nibbles)
    ]


def test_compressed_tensors_divides_the_product(tmp_path: Path) -> None:
    tensors = compressed()
    whole = Fraction(float(tensors["x.weight_global_scale"]))
    expected = [[float(x / whole) for x in row] for row in products(tensors)]
    assert np.array_equal(numbers(only(stored(tmp_path, tensors))), expected)


def test_modelopt_multiplies(tmp_path: Path) -> None:
    tensors = modelopt()
    whole = Fraction(float(tensors["x.weight_scale_2"]))
    expected = [[float(x * whole) for x in row] for row in products(tensors)]
    parts = only(stored(tmp_path, tensors | {"x.input_scale": torch.tensor(0.5)}))
    assert np.array_equal(numbers(parts), expected)
    assert "x.input_scale" in parts.weight.tensors


def test_a_global_scale_of_0_divides_nothing(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, compressed(0.0)))
    with pytest.raises(InputError) as error:
        codec_of(parts).check(parts)
    assert error.value.culprit == "x.weight_global_scale"


@pytest.mark.parametrize("make", [compressed, modelopt])
@pytest.mark.parametrize("which", [1, 2])
def test_scales_must_be_finite(tmp_path: Path, make: object, which: int) -> None:
    tensors = make()  # type: ignore[operator]
    name = list(tensors)[which]
    tensors[name] = torch.full_like(tensors[name].float(), torch.nan).to(tensors[name].dtype)
    parts = only(stored(tmp_path, tensors))
    with pytest.raises(InputError) as error:
        codec_of(parts).check(parts)
    assert error.value.culprit == name


@pytest.mark.parametrize(
    ("make", "name", "other"),
    [
        (compressed, "x.weight_scale", None),
        (compressed, "x.weight_scale", scales(3, 3)),
        (compressed, "x.weight_scale", torch.ones(3, 2)),
        (compressed, "x.weight_global_scale", None),
        (compressed, "x.weight_global_scale", torch.ones(3)),
        (compressed, "x.weight_global_scale", torch.ones(1).half()),
        (modelopt, "x.weight_scale", None),
        (modelopt, "x.weight_scale", scales(2, 3)),
        (modelopt, "x.weight_scale_2", torch.ones(3)),
    ],
)
def test_a_wrong_companion_makes_no_weight(tmp_path: Path, make: object, name: str, other: Tensor | None) -> None:
    tensors = make()  # type: ignore[operator]
    del tensors[name]
    checkpoint = stored(tmp_path, tensors | ({} if other is None else {name: other}))
    assert not checkpoint.weights
    (fault,) = checkpoint.faults.values()
    assert name in fault


def test_a_scale_of_the_input_is_not_passed_over(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, modelopt() | {"x.pre_quant_scale": torch.ones(32)})
    assert "x.pre_quant_scale" in checkpoint.faults["x.weight"]


def test_comfyuis_order_is_not_read_as_modelopts(tmp_path: Path) -> None:
    mark = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    checkpoint = stored(tmp_path, modelopt() | {"x.comfy_quant": mark})
    assert all(weight.codec.key != "nvfp4" for weight in checkpoint.weights.values())
