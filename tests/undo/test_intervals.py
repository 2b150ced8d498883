"""Hold the intervals of weights: whatever the weights and the delta, the reader gets back what the writer had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.numerics.exact import apply_rounded
from loratool.undo.intervals import FLOAT_FORMATS, pack, unpack
from loratool.undo.records import Recorder, Restorer

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
INTEGERS = {"BF16": (torch.int16, 16), "F16": (torch.int16, 16), "F32": (torch.int32, 32), "F64": (torch.int64, 64)}


def round_trip(W: Tensor, c: Tensor, a: Tensor | None = None) -> tuple[bool, Tensor, int]:
    """Return whether W comes back bit for bit from W' = round_once(a * W + c), W', and the bytes of the record."""
    from loratool.numerics.exact import Workspace

    work = Workspace(torch.device("cpu"))

    def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor | None:
        out.copy_(c[:, columns])
        return None if a is None else a

    recorder, merged = Recorder(W.dtype), torch.empty_like(W)
    done = apply_rounded(W, fill, merged, work, recorder.witness, 1024)
    if done.overflowed:
        return True, merged, 0  # a merge refuses it
    recorded = recorder.take(done, W, merged)
    restorer = Restorer("x", W.dtype, recorded.payload, recorded.sha256)
    back = torch.empty_like(W)
    restorer.block(merged, fill, back, work)
    restorer.check(back, merged, True)
    return torch.equal(back.view(torch.uint8), W.view(torch.uint8)), merged, len(recorded.payload)


@pytest.mark.parametrize("form", TYPES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_the_least_numbers_and_changes_of_few_bits(form: str, seed: int) -> None:
    """Among subnormals the grid is uniform, and sums with many zero bits are no midpoints for that."""
    kind, size = INTEGERS[form]
    g = np.random.default_rng(seed)
    mantissa = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}[form]
    W = torch.from_numpy(g.integers(0, 64, (3, 1100)) | (g.integers(0, 2, (3, 1100)) << (size - 1))).to(kind)
    digits, behind = g.integers(1, 16, W.shape), g.integers(0, 14, W.shape)
    steps = np.round(g.standard_normal(W.shape) * 2.0**digits) * 2.0**-behind
    c = torch.from_numpy(steps) * (torch.finfo(TYPES[form]).tiny * 2.0**-mantissa)
    assert round_trip(W.view(TYPES[form]), c)[0]


@pytest.mark.parametrize("form", TYPES)
@given(data=st.data())
@settings(max_examples=60)
def test_any_bits(form: str, data: Any) -> None:
    """Random bit patterns, changes of any size beside them, scales of any sign."""
    kind, size = INTEGERS[form]
    seed = data.draw(st.integers(0, 2**32))
    g = np.random.default_rng(seed)
    low, high = -(1 << (size - 1)), (1 << (size - 1)) - 1
    W = torch.from_numpy(g.integers(low, high, (3, 1100), endpoint=True)).to(kind).view(TYPES[form])
    finite = torch.where(W.isfinite(), W.double().abs(), 0.0)
    relative = torch.from_numpy(10.0 ** g.integers(-7, 4, W.shape))
    c = torch.from_numpy(g.standard_normal(W.shape)) * finite * relative
    c = torch.where(torch.from_numpy(g.random(W.shape) < 0.1), 0.0, c).clamp(-1e300, 1e300)
    if data.draw(st.booleans()):
        c = c.to(TYPES[form]).double() * data.draw(st.sampled_from([0.5, 1.0, 1.5]))  # ties
        c = c.nan_to_num(0.0, 0.0, 0.0)
    scale = data.draw(st.sampled_from([None, 1.0, 0.99, 1.01, -0.3, 0.5, 2.0, 1e-3, -1e3, 0.0]))
    a = None if scale is None else torch.full((3, 1), scale, dtype=torch.float64)
    assert round_trip(W, c, a)[0]


@pytest.mark.parametrize("form", FLOAT_FORMATS)
def test_ties_and_their_neighbours(form: str) -> None:
    """Sums at a midpoint, and a few float64 ulps to both sides of it."""
    g = torch.Generator().manual_seed(0)
    W = (torch.randn(8, 4096, generator=g) * 0.02).to(TYPES[form])
    step = (torch.nextafter(W.abs(), torch.full_like(W, torch.inf)) - W.abs()).double()
    halves = torch.randint(-6, 7, W.shape, generator=g).double() / 2
    for nudge in (0, 1, -1, 3, 1000):
        c = step * halves * (1 + nudge * 2.0**-52)
        assert round_trip(W, c)[0]
        assert round_trip(W, c, torch.ones(8, 1, dtype=torch.float64))[0]


@pytest.mark.parametrize(
    ("a", "c"),
    [("0x1.ffffffffe264bp-1", "0x1.0000050000000p-126"), ("-0x1.2a3349cf51544p-1", "0x1.0000022a3349dp-126")],
)
def test_a_scaled_weight_far_below_the_normal_numbers(a: str, c: str) -> None:
    """The float64 rounding of a sum near 2**-126 is more than its share of one ulp of W."""
    W = torch.tensor([[1]], dtype=torch.int32).view(torch.float32)
    factor, change = (torch.tensor([[float.fromhex(x)]], dtype=torch.float64) for x in (a, c))
    assert round_trip(W, change, factor)[0]


@pytest.mark.parametrize("form", FLOAT_FORMATS)
@pytest.mark.parametrize("place", ["least", "second", "one", "last"])
@pytest.mark.parametrize("scale", [None, 1.0, -1.0, 0.5])
def test_sums_across_a_power_of_two(form: str, place: str, scale: float | None) -> None:
    """Ulps change their size there, or, at the least normal number, do not: weights and sums to both sides."""
    kind, tiny = INTEGERS[form][0], torch.finfo(TYPES[form]).tiny
    power = {"least": tiny, "second": 2 * tiny, "one": 1.0, "last": 1 / tiny * 2}[place]
    at = torch.tensor(power, dtype=TYPES[form]).view(kind)
    around = (at + torch.arange(-24, 25, dtype=kind)).view(TYPES[form])
    step = float((around[25].double() - around[24].double()).item())
    moves = torch.arange(-400, 401).double() * (step / 8)
    W = torch.cat([around, -around]).reshape(-1, 1).expand(-1, len(moves)).contiguous()
    a = None if scale is None else torch.full((len(W), 1), scale, dtype=torch.float64)
    for nudge in (0.0, 1e-15, -1e-15, 1e-9):
        c = moves * (1 + nudge) + (0.0 if scale is None else W.double() * (1 - scale))
        assert round_trip(W, c.expand(W.shape), a)[0]


@pytest.mark.parametrize("form", FLOAT_FORMATS)
@pytest.mark.parametrize("scale", [0.999, 1.001, 1.5, -2.0])
def test_cancellation(form: str, scale: float) -> None:
    g = torch.Generator().manual_seed(1)
    W = (torch.randn(4, 2048, generator=g) * 0.02).to(TYPES[form])
    for leave in (0.0, 1e-12, 1e-6, 1e-3):
        c = -scale * W.double() * (1 + leave * torch.randn(W.shape, generator=g, dtype=torch.float64))
        assert round_trip(W, c, torch.full((4, 1), scale, dtype=torch.float64))[0]
        assert round_trip(W, c / scale)[0]


@given(st.lists(st.tuples(st.integers(1, 33), st.integers(0, 2**33 - 1)), max_size=300))
@example([(33, 2**32)])
@example([(1, 1), (8, 255), (9, 256), (16, 2**15), (17, 2**16), (32, 2**31)])
def test_packing(numbers: list[tuple[int, int]]) -> None:
    width = np.array([w for w, _ in numbers], np.int64)
    index = np.array([n & ((1 << w) - 1) for w, n in numbers], np.int64)
    data = pack(index, width, [len(index)])[0]
    assert len(data) == (sum(w for w, _ in numbers) + 7) // 8
    assert (unpack(data, width) == index).all()
    with pytest.raises(ValueError, match="bytes hold no"):
        unpack(data + b"x", width)
