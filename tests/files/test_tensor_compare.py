"""Hold comparisons of stored tensors to numpy's, and the noise of a stored type or of codes to its known steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import weights, write_model
from lib.files.gguf_bytes import tensor, write
from safetensors.torch import save_file
from torch import Tensor

from loratool.errors import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.tensor_compare import compare, difference, matrix_difference, same_bytes, same_values
from loratool.files.tensor_ref import BLOCK, TensorRef
from loratool.numerics.arrays import ON_CPU

NAN, INF = float("nan"), float("inf")


def model(folder: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    return open_checkpoint(write_model(folder, tensors, {}))


def q8_0(path: Path, codes: list[list[int]], scales: list[float]) -> Checkpoint:
    """A GGUF file of one weight: 32 codes in a block, each of them times the block's float16."""
    data = b"".join(np.float16(d).tobytes() + np.array(c, "i1").tobytes() for c, d in zip(codes, scales, strict=True))
    return open_checkpoint(write(path, {"general.architecture": "x"}, {"w.weight": tensor(8, (len(codes), 32), data)}))


def test_same_values_rounds_the_first_to_the_type_of_the_second(tmp_path: Path) -> None:
    x = weights(7, 5)
    tensors = {"x": x, "rounded": x.bfloat16(), "other": x.bfloat16().flip(0).contiguous(), "flat": x.flatten().clone()}
    m = model(tmp_path, tensors)
    assert same_values(m.ref("x"), m.ref("rounded")) and not same_values(m.ref("rounded"), m.ref("x"))
    assert not same_values(m.ref("x"), m.ref("other")) and not same_values(m.ref("x"), m.ref("flat"))


def test_same_values_of_what_has_no_rows_of_floats_are_its_bytes(tmp_path: Path) -> None:
    tensors = {
        "ints": torch.arange(4), "same": torch.arange(4), "others": torch.arange(4) + 1, "int32": torch.arange(4).int(),
        "one": torch.tensor(1.0), "one too": torch.tensor(1.0), "half": torch.tensor(1.0).half(),
        "none": torch.empty(0, 3), "none too": torch.empty(0, 3),
    }  # fmt: skip
    m = model(tmp_path, tensors)
    alike = [("ints", "same"), ("one", "one too"), ("none", "none too")]
    assert all(same_values(m.ref(a), m.ref(b)) for a, b in alike)
    assert not any(same_values(m.ref(a), m.ref(b)) for a, b in [("ints", "others"), ("ints", "int32"), ("one", "half")])


def test_numbers_of_codes_are_compared(tmp_path: Path) -> None:
    coded = q8_0(tmp_path / "x.gguf", [[127] * 32, [-1] * 32], [1 + 2.0**-10, 2.0**-14])
    exact = torch.tensor([[127 * (1 + 2.0**-10)] * 32, [-(2.0**-14)] * 32], dtype=torch.float64)
    m = model(tmp_path / "m", {"bf16": exact.bfloat16(), "f32": exact.float(), "off": exact.float() * (1 + 2.0**-23)})
    assert same_values(coded.ref("w.weight"), m.ref("bf16")) and same_values(coded.ref("w.weight"), m.ref("f32"))
    assert not same_values(coded.ref("w.weight"), m.ref("off"))


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    """Just above the middle of two bfloat16, which is what float32 on the way would make of it, to be rounded down."""
    x = torch.full((2, 2), 1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    tensors = {"x": x, "up": torch.full((2, 2), 1 + 2.0**-7).bfloat16(), "down": torch.ones(2, 2).bfloat16()}
    m = model(tmp_path, tensors)
    assert same_values(m.ref("x"), m.ref("up")) and not same_values(m.ref("x"), m.ref("down"))


def test_same_bytes_whatever_the_shape(tmp_path: Path) -> None:
    """Two blocks and a rest, of which each is compared."""
    x = torch.arange(BLOCK * 2 + 8, dtype=torch.int64).to(torch.uint8)
    last, middle = x.clone(), x.clone()
    last[-1] += 1
    middle[BLOCK + 3] += 1
    m = model(tmp_path, {"x": x, "flat": x.view(-1, 8).clone(), "last": last, "middle": middle, "signed": x.char()})
    assert same_bytes(m.ref("x"), m.ref("flat"))
    assert not any(same_bytes(m.ref("x"), m.ref(name)) for name in ("last", "middle", "signed"))


def noise(base: TensorRef, tuned: TensorRef) -> tuple[list[float], list[float]]:
    """On torch's tensors too, as on a GPU."""
    here, there = (difference(base, tuned, like) for like in (ON_CPU, torch.empty(0)))
    assert here.D.dtype == np.float32 and np.array_equal(here.D, there.D)
    assert there.base_squared == pytest.approx(here.base_squared, rel=1e-6)
    assert there.noise.rows.tolist() == pytest.approx(here.noise.rows.tolist(), rel=1e-6)
    return here.noise.rows.tolist(), here.noise.columns.tolist()


def sums(*variances: np.ndarray[Any, Any]) -> Any:
    """The rows' sums and the columns', approximately."""
    total = sum(each.astype(np.float64) for each in variances)
    return pytest.approx(total.sum(1).tolist()), pytest.approx(total.sum(0).tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_noise_is_that_of_both_types_steps(tmp_path: Path, dtype: torch.dtype) -> None:
    """numpy tells the step at each number; that of zero is the least that the type has."""
    x = torch.tensor([[1.0, 1.5, 2.0, 1000.0], [0.0, 3e-8, -0.25, 6e4]]).to(dtype)
    base = weights(2, 4, dtype=dtype)
    m = model(tmp_path, {"base": base, "tuned": x})
    steps = [np.spacing(np.abs(each.numpy())).astype(np.float64) for each in (base, x)]
    assert noise(m.ref("base"), m.ref("tuned")) == sums(*(each**2 / 12 for each in steps))
    found = difference(m.ref("base"), m.ref("tuned"), ON_CPU)
    assert np.array_equal(found.D, (x.double() - base.double()).float() if dtype == torch.float64 else x.float() - base)
    assert found.base_squared == pytest.approx(float(base.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_noise_of_short_types_is_that_of_their_next_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    codes = torch.tensor([[0, 1, 3, 9, 40, 77, 100]]).to(bits)
    x, following = (each.view(dtype).double() for each in (codes, codes + 1))
    m = model(tmp_path, {"base": torch.zeros(1, 7), "tuned": codes.view(dtype)})
    assert noise(m.ref("base"), m.ref("tuned")) == sums(((following - x) ** 2 / 12).numpy())


def test_noise_beyond_what_float32_squares(tmp_path: Path) -> None:
    x = torch.tensor([[1e38, 3e38], [1e-25, -2e-25]])
    for i, rows in enumerate((x[:1], x[1:])):
        m = model(tmp_path / str(i), {"base": torch.zeros(1, 2), "tuned": rows.clone()})
        assert noise(m.ref("base"), m.ref("tuned")) == sums(
            np.spacing(np.abs(rows.numpy())).astype(np.float64) ** 2 / 12
        )


def test_the_noise_of_codes_is_that_of_their_steps(tmp_path: Path) -> None:
    """A step of Q8_0 is its block's scale, of all alike; the neighbour of the last code is the one below it."""
    scales, draw = [2.0 ** -(3 + i % 5) for i in range(64)], np.random.default_rng(0)
    codes = draw.integers(-128, 128, (64, 32)).tolist()
    coded = q8_0(tmp_path / "x.gguf", codes, scales)
    m = model(tmp_path / "m", {"base": weights(64, 32)})
    steps = np.tile(np.array(scales)[:, None], (1, 32))
    assert noise(m.ref("base"), coded.ref("w.weight")) == sums(steps**2 / 12)
    exact = torch.tensor(codes, dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64)[:, None]
    found = difference(m.ref("base"), coded.ref("w.weight"), ON_CPU)
    assert np.array_equal(found.D, (exact - weights(64, 32).double()).float())


def test_a_side_of_large_steps_is_no_more_of_a_difference_than_all_of_it(tmp_path: Path) -> None:
    """A fine-tune of the numbers that codes mean is off by none of their steps, and by its own."""
    scale, draw = 0.125, np.random.default_rng(0)
    codes = draw.integers(-100, 100, (64, 32))
    coded = q8_0(tmp_path / "x.gguf", codes.tolist(), [scale] * 64)
    tuned = torch.from_numpy(codes * scale).float() + 1e-3
    m = model(tmp_path / "m", {"tuned": tuned})
    found = difference(coded.ref("w.weight"), m.ref("tuned"), ON_CPU)
    own = float(np.square(np.spacing(np.abs(tuned.numpy())).astype(np.float64)).sum()) / 12
    assert found.noise.energy == pytest.approx(64 * 32 * 1e-3**2 + own, rel=1e-3)


def test_a_weight_of_one_code_has_no_step(tmp_path: Path) -> None:
    coded = q8_0(tmp_path / "x.gguf", [[5] * 32] * 2, [0.5] * 2)
    m = model(tmp_path / "m", {"base": torch.zeros(2, 32)})
    assert difference(m.ref("base"), coded.ref("w.weight"), ON_CPU).noise.energy < 1e-80  # that of float32's zeros


def test_a_matrix_of_several_weights_is_their_rows(tmp_path: Path) -> None:
    parts = {
        f"{side}.{i}": weights(rows, 6, seed=i + 10 * len(side))
        for side in ("b", "tt")
        for i, rows in enumerate((3, 5))
    }
    whole = {side: torch.cat([parts[f"{side}.0"], parts[f"{side}.1"]]) for side in ("b", "tt")}
    m = model(tmp_path, {**parts, **whole})
    found = matrix_difference([m.ref("b.0"), m.ref("b.1")], [m.ref("tt.0"), m.ref("tt.1")], ON_CPU)
    alone = matrix_difference([m.ref("b")], [m.ref("tt")], ON_CPU)
    assert np.array_equal(found.D, whole["tt"] - whole["b"]) and np.array_equal(alone.D, found.D)
    assert found.base_squared == pytest.approx(float(whole["b"].double().square().sum()), rel=1e-6)
    steps = [np.spacing(np.abs(whole[side].numpy())).astype(np.float64) for side in ("b", "tt")]
    assert (found.noise.rows.tolist(), found.noise.columns.tolist()) == sums(*(each**2 / 12 for each in steps))


def test_what_has_no_difference_is_refused(tmp_path: Path) -> None:
    hole = weights(4, 4)
    hole[2, 1] = NAN
    m = model(tmp_path, {"x": weights(4, 4), "hole": hole, "wide": weights(4, 5), "huge": torch.full((4, 4), 3e38)})
    with pytest.raises(InputError, match=r"is \(4, 4\) in the base and \(4, 5\) in the tuned model"):
        difference(m.ref("x"), m.ref("wide"), ON_CPU)
    for base, tuned in (("x", "hole"), ("hole", "x")):
        with pytest.raises(InputError, match="holds nan or inf in one of the models"):
            difference(m.ref(base), m.ref(tuned), ON_CPU)
    found = difference(m.ref("x"), m.ref("huge"), ON_CPU)  # whose sum and squares overflow, and nothing else
    assert bool(np.isfinite(found.D).all()) and math.isfinite(found.noise.edge())
    assert difference(m.ref("huge"), m.ref("x"), ON_CPU).base_squared == pytest.approx(
        16 * float(np.float32(3e38)) ** 2
    )


def test_changed_bits_of_what_is_no_float(tmp_path: Path) -> None:
    ints = torch.arange(6).view(2, 3)
    others = ints.clone()
    others[0, 1], others[1, 2] = 300, -1
    tensors = {"ints": ints, "others": others, "short": ints.short(), "bool": ints > 2, "none": torch.empty(0, 2)}
    m = model(tmp_path, tensors)
    found = compare(m.ref("ints"), m.ref("others"))
    assert (found.equal, found.changed, found.max_ulps) == (False, 2, None)
    assert compare(m.ref("ints"), m.ref("ints")).equal
    found = compare(m.ref("ints"), m.ref("short"))
    assert not found.equal and found.changed == 6
    assert compare(m.ref("none"), m.ref("none")).equal


def test_changed_bits_below_a_byte_are_all_if_any(tmp_path: Path) -> None:
    for name, byte in (("a", 0x21), ("b", 0x31)):
        packed = torch.full((4, 2), byte, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        save_file({"x": packed}, tmp_path / f"{name}.safetensors")
    one, two = (open_checkpoint(tmp_path / f"{name}.safetensors").ref("x") for name in "ab")
    assert one.spec.dtype == "F4" and one.spec.shape == (4, 4)
    found = compare(one, two)
    assert (found.equal, found.changed) == (False, 16) and compare(one, one).equal


def test_distances_are_numpys(tmp_path: Path) -> None:
    """Over finite numbers; those that are not so on one side are counted apart."""
    x, y = weights(30, 8, seed=1), weights(30, 8, seed=1)
    y[3, 3], y[4, 4] = 7.0, -7.0
    hole = y.clone()
    hole[0, 0], hole[1, 1] = INF, NAN
    m = model(tmp_path, {"x": x, "y": y, "hole": hole, "half": x.half()})
    found = compare(m.ref("x"), m.ref("y"))
    a, b = x.double().numpy(), y.double().numpy()
    assert found.norms == pytest.approx((np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(b - a)))
    assert found.largest == pytest.approx(np.abs(b - a).max()) and found.changed == 2
    bits = [side.numpy().view("<i4").astype(np.int64) for side in (x, y)]
    ordinals = [np.where(each < 0, -(each & 0x7FFFFFFF), each) for each in bits]
    assert found.max_ulps == np.abs(ordinals[1] - ordinals[0]).max()
    assert compare(m.ref("x"), m.ref("hole")).not_finite == 2
    assert compare(m.ref("hole"), m.ref("hole")).equal
    found = compare(m.ref("x"), m.ref("half"))
    assert found.max_ulps is None and not found.equal
