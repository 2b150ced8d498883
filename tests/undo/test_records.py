"""Hold the records of undo: whatever W and the update are, W comes back, and a run is what all numbers tell."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits, factors, slow, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.hostile.hostile_reals import form_of
from lib.hostile.strange_rows import STRANGE, product_of
from torch import Tensor

from loratool.errors import InputError
from loratool.numerics.arrays import Numbers
from loratool.numerics.decide import Factor, Reals, decide
from loratool.numerics.forms import Bits, number, place
from loratool.numerics.merge import RowMerge
from loratool.numerics.rounding_stats import RoundingStats
from loratool.numerics.stored import Stored, Sum
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.undo.candidates import every, find_runs
from loratool.undo.differences import UNIT, Reader, pack_code_differences, pack_differences
from loratool.undo.records import RecordedBlock, Recorder, Restorer, subtract

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FACTORS = (None, 1.0, 0.0, -0.7, 1 / 3, 0.999, 2.0, -(2.0**-9), 1e-3, -1e3)

types = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
shorter = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=NAMES.get)
shortest = pytest.mark.parametrize("dtype", [BF16, FP16], ids=NAMES.get)


def scaled(D: Tensor, a: float | None = None) -> Reals:
    """Return the reals of X = a W + D. D: (m, n), any type."""
    return Reals(Stored(D, 1.0), None if a is None else Factor.of_rows([Fraction(a)] * len(D)))


def merged(W: Tensor, x: Reals) -> tuple[Tensor, RecordedBlock]:
    result = torch.empty_like(W)
    base, out = numbers_of(W), numbers_of(result)
    recorder = Recorder(base.form)
    change = RowMerge(x, base.form, base.form).apply(base, 0, out, Workspace(), recorder)
    return result, recorder.result(change, out)


def restored(out: Tensor, x: Reals, record: RecordedBlock) -> Tensor:
    found = torch.empty_like(out)
    result, back = numbers_of(out), numbers_of(found)
    restorer = Restorer("x", result.form, record.payload, record.sum)
    with restorer.damage():
        restorer.block(result, x, back, Workspace())
    restorer.check(result)
    return found


def comes_back(W: Tensor, x: Reals) -> RecordedBlock:
    """Merge W and restore it; weights that overflow, which a merge refuses, are zeros."""
    out, record = merged(W, x)
    if record.change.overflowed:
        W = torch.where(W.isfinite() & ~out.isfinite(), 0.0, W)
        out, record = merged(W, x)
    assert not record.change.overflowed
    assert torch.equal(bits(restored(out, x, record)), bits(W))
    return record


def any_bits(g: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return numbers of random bits; inf and nan are a few."""
    found = torch.from_numpy(g.integers(-(2**63), 2**63 - 1, shape, endpoint=True))
    return found.to(INTEGERS[dtype.itemsize]).view(dtype)


class TestRoundTrips:
    @pytest.mark.parametrize("strange", STRANGE)
    @types
    def test_strange_weights(self, dtype: torch.dtype, strange: str) -> None:
        W, (A, B) = STRANGE[strange](weights(6, 30, dtype=dtype)), factors(6, 30, 3)
        B[::3] = 0
        for size in (0.0, 1e-3, 1e4):
            comes_back(W, product_of(A, B, size))

    @types
    @given(seed=st.integers(0, 2**32), a=st.sampled_from(FACTORS), is_tied=st.booleans())
    @settings(max_examples=8)
    def test_any_bits(self, dtype: torch.dtype, seed: int, a: float | None, is_tied: bool) -> None:
        """Changes of any size beside them, or of few bits, so that sums are ties."""
        g = np.random.default_rng(seed)
        W, most = any_bits(g, (3, 60), dtype), torch.finfo(dtype).max / 2
        finite = torch.where(W.isfinite(), W.double().abs(), 0.0)
        D = torch.from_numpy(g.standard_normal(W.shape) * 10.0 ** g.integers(-7, 4, W.shape)) * finite
        D = torch.where(torch.from_numpy(g.random(W.shape) < 0.1), 0.0, D).clamp(-most, most)
        if is_tied:
            D = (D.to(dtype).double() * g.choice([0.5, 1.0, 1.5])).nan_to_num(0.0, 0.0, 0.0).clamp(-most, most)
        comes_back(W, scaled(D, a))

    @types
    @given(seed=st.integers(0, 2**32), a=st.sampled_from(FACTORS))
    @settings(max_examples=5)
    def test_the_least_numbers(self, dtype: torch.dtype, seed: int, a: float | None) -> None:
        """Among subnormals the grid is uniform; changes of few bits make ties."""
        g = np.random.default_rng(seed)
        signs = torch.from_numpy(g.integers(0, 2, (3, 60)) << (8 * dtype.itemsize - 1))
        W = (torch.from_numpy(g.integers(0, 64, (3, 60))) | signs).to(INTEGERS[dtype.itemsize]).view(dtype)
        digits, behind = g.integers(1, 16, W.shape), g.integers(0, 14, W.shape)
        steps = np.round(g.standard_normal(W.shape) * 2.0**digits) * 2.0**-behind
        comes_back(W, scaled(torch.from_numpy(steps) * (torch.finfo(dtype).tiny * torch.finfo(dtype).eps), a))

    @shorter
    @pytest.mark.parametrize("at", ["least", "second", "one", "last"])
    @pytest.mark.parametrize("a", [None, -0.5])
    def test_sums_across_a_power_of_two(self, dtype: torch.dtype, at: str, a: float | None) -> None:
        """Steps change their size there, or, at the least normal number, do not: weights and sums to both sides."""
        tiny, kind = torch.finfo(dtype).tiny, INTEGERS[dtype.itemsize]
        power = torch.tensor({"least": tiny, "second": 2 * tiny, "one": 1.0, "last": 1 / tiny * 2}[at], dtype=dtype)
        around = (power.view(kind) + torch.arange(-2, 3, dtype=kind)).view(dtype)
        moves = torch.arange(-10, 11).double() * (float(around[3].double() - around[2].double()) / 8)
        W = torch.cat([around, -around])[:, None].expand(-1, len(moves)).contiguous()
        for nudge in (0.0, -(2.0**-50)):
            D = moves * (1 + nudge) + W.double() * (0 if a is None else 1 - a)
            comes_back(W, scaled(D, a))

    @pytest.mark.parametrize("a", [2.0**55 * 1.37, 2.0**-140 * 1.37, -(2.0**-145) * 1.9, 2.0**-60])
    def test_factors_beyond_float32(self, a: float) -> None:
        """Their quotients, or they themselves, have few bits there: the runs must not come from those."""
        g = np.random.default_rng(0)
        low, high = (1, 400) if a > 1 else (0x7000, 0x7F00)
        W = torch.from_numpy(g.integers(low, high, (2, 300))).to(torch.int16).view(BF16)
        D = torch.zeros(2, 300, dtype=FP64)
        D[0, ::2] = 2.0**-120
        comes_back(W, scaled(D, a))

    @types
    @pytest.mark.parametrize("power", [slow(-1060), -500, slow(-100), slow(100), 500])
    def test_products_beyond_what_a_gemm_can_bound(self, dtype: torch.dtype, power: int) -> None:
        """Nothing is decided then, and every weight is asked for, on the way back too."""
        W, (A, B) = weights(4, 20, dtype=dtype), factors(4, 20, 2)
        W[1, ::3], B[2] = -0.0, 0.0
        half = power // 2
        comes_back(W, product_of(A.double() * 2.0**half, B.double() * 2.0 ** (half - power)))
        comes_back(W, product_of(A, B, 2.0 ** -abs(power)))

    @shorter
    def test_cancellation(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(1)
        W = weights(2, 60, dtype=dtype)
        for a in (1.5, -2.0, None):
            for leave in (0.0, 1e-12, 1e-3):
                D = -W.double() * (1 + leave * torch.randn(W.shape, generator=g, dtype=FP64))
                comes_back(W, scaled((a or 1.0) * D, a))

    @shorter
    @pytest.mark.parametrize("factor", [BF16, FP16, FP32], ids=NAMES.get)
    def test_ties_of_products(self, dtype: torch.dtype, factor: torch.dtype) -> None:
        """Factors of few bits, so that a GEMM is exact and sums are ties, and a third of them, which is beside one."""
        g = torch.Generator().manual_seed(2)
        W = (torch.randint(-(2**9), 2**9, (12, 100), generator=g) * 2.0**-9).to(dtype)
        W[W == 1] = -0.0
        unit = torch.finfo(dtype).eps / 4
        A = torch.randint(-6, 7, (2, 100), generator=g).to(factor)
        B = torch.randint(-6, 7, (12, 2), generator=g).to(factor)
        for scale in (unit, unit / 3, unit * 2.0**12):
            comes_back(W, product_of(A, B, scale))

    @shorter
    def test_any_block_or_tile_gives_the_same_record(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        W, (A, B) = weights(9, 70, dtype=dtype), factors(9, 70, 4)
        W[2], W[5:8, ::2] = -0.0, 0.0
        expected = comes_back(W, product_of(A, B, 0.5))
        for tile, asked, together in ((1, 50, 7), (150, 9, 1 << 16), (1 << 12, 999, 20)):
            monkeypatch.setattr("loratool.numerics.dense.TILE", {np.float32: tile, np.float64: tile})
            monkeypatch.setattr("loratool.undo.records.ASKED", asked)
            monkeypatch.setattr("loratool.numerics.merge.TOGETHER", together)
            found = comes_back(W, product_of(A, B, 0.5))
            assert (found.payload, found.sum) == (expected.payload, expected.sum)

    @types
    @pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1)])
    def test_odd_shapes(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        W, (A, B) = weights(*shape, dtype=dtype), factors(*shape, 2)
        comes_back(W, product_of(A, B, 0.3))
        comes_back(W, scaled(W.flip(0).double(), 0.25))

    @types
    def test_replaced_values(self, dtype: torch.dtype) -> None:
        """Of any bits, -0.0, inf and nan among them: more than a unit of differences."""
        g = np.random.default_rng(3)
        W, out = any_bits(g, (3, UNIT // 2 + 9), dtype), any_bits(g, (3, UNIT // 2 + 9), dtype)
        out[1] = W[1]
        W[0, :2], out[0, :2] = torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])
        base, result, back = numbers_of(W), numbers_of(out), numbers_of(torch.empty_like(W))
        recorder = Recorder(base.form)
        recorder.difference(base, result)
        record = recorder.result(RoundingStats(), result)
        restorer = Restorer("x", base.form, record.payload, record.sum)
        restorer.replaced(result, back, Workspace())
        restorer.check(result)
        assert np.array_equal(back.bits, base.bits)


def deltas(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return D of a row as values and as a product's factors (r, n) and (1, r): ties, tiny, large and other ones."""
    g = torch.Generator().manual_seed(5)
    step, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    D = [0.0, step / 2, -step / 4, step * 0.75, 2.0**-200, tiny * step / 2, -tiny * step * 2.5, tiny / 3, 0.01, -7 / 9]
    D += [2.0 ** float(e) for e in torch.randint(-12, 12, (3,), generator=g)]
    D += (torch.randn(5, generator=g) * 10.0 ** torch.randint(-4, 4, (5,), generator=g)).tolist()
    values = torch.tensor([D], dtype=FP64)
    return values, torch.cat([values / 3, values / 3, values / 3 + 2.0**-60])


@dataclass(frozen=True)
class Found:
    """The run of each finite W', from what every finite W gives."""

    result: Bits
    start: Bits
    count: Bits
    holds_zero: Bits  # bool


def brute_force(x: Reals, i: int, j: int, dtype: torch.dtype) -> Found:
    form = form_of(dtype)
    at = np.arange(-form.inf, form.inf)
    made = decide(x, number(at, form), form, np.full(len(at), i), np.full(len(at), j), form)
    edges = np.flatnonzero(np.diff(made, prepend=~made[:1]))  # one run for each W', as rounding is monotone
    result, start, count = made[edges], at[edges], np.diff(edges, append=len(at))
    assert len(np.unique(result)) == len(result)
    fine = (result & form.size) < form.inf
    result, start, count = (y[fine] for y in (result, start, count))
    return Found(result, start, count, (start <= 0) & (start + count > 0))


def known_as(exact: Fraction, j: int) -> list[tuple[Any, float]]:
    """Return a D that a GEMM may have given, and a bound on its error: nothing, float32, float64, or exactly."""
    single, double = np.float32(float(exact)), float(exact)
    off = abs(float(Fraction(float(single)) - exact)) * 1.001 + 2.0**-100
    choice: list[tuple[Any, float]] = [
        (np.float64(np.nan), 0.0),
        (single, off),
        (np.float64(double), abs(double) * 2.0**-52 + 2.0**-900),
    ]
    return [choice[j % 3], *([(np.float64(double), 0.0)] if Fraction(double) == exact else [])]


def check_runs(dtype: torch.dtype, a: float | None, columns: range, most: int) -> int:
    """Hold the runs of so many W' and more, those near zero and near the ends among them; return how many they were."""
    (D, right), form, count = deltas(dtype), form_of(dtype), 0
    for x in [scaled(D, a), *([] if a else [product_of(right, torch.ones(1, 3))])]:
        for j in columns:
            exact, found = x.delta.exact(0, j), brute_force(x, 0, j, dtype)
            near_zero = np.abs(np.arange(len(found.result)) - np.flatnonzero(found.holds_zero)[0]) < 40
            some = np.flatnonzero(near_zero | (np.arange(len(near_zero)) % (len(near_zero) // most + 1) == 0))
            at = np.full(len(some), j)
            for change, reach in known_as(exact, j):
                given_change = np.full(len(at), change)
                runs = find_runs(x, found.result[some], at, 0, D.shape[1], given_change, reach, form)
                whole = found.holds_zero[some] & (not x.keeps(0, j))
                assert (runs.count == np.where(whole, every(form), found.count[some])).all()
                assert (runs.start == found.start[some])[~whole].all()
                count += len(some)
    return count


class TestRuns:
    @shortest
    @pytest.mark.parametrize("a", FACTORS[::2])
    def test_some_are_what_brute_force_finds(self, dtype: torch.dtype, a: float | None) -> None:
        assert check_runs(dtype, a, range(FACTORS.index(a), 18, 9), 150) > 200

    @pytest.mark.slow
    @shortest
    @pytest.mark.parametrize("a", [*FACTORS, 2.0**-140 * 1.37, 2.0**60])
    def test_they_are_what_brute_force_finds(self, dtype: torch.dtype, a: float | None) -> None:
        """Each of the 2**16 numbers is in the run of its W', and no other is."""
        assert check_runs(dtype, a, range(18), 1 << 16) > 10

    @shorter
    @given(seed=st.integers(0, 2**32), a=st.sampled_from(FACTORS))
    @settings(max_examples=8)
    def test_their_ends(self, dtype: torch.dtype, seed: int, a: float | None) -> None:
        """By fractions: the first and the last number give W', their neighbours do not."""
        g, form = np.random.default_rng(seed), form_of(dtype)
        W = any_bits(g, (1, 40), dtype)
        W = torch.where(W.isfinite() & (W.double().abs() < torch.finfo(dtype).max / 1e4), W, 1.0)
        D = torch.from_numpy(g.standard_normal(W.shape) * 10.0 ** g.integers(-7, 3, W.shape)) * W.double().abs()
        D = D.to(g.choice([FP64, FP32, BF16])).double() if g.random() < 0.7 else (W.double() * 0.5).to(dtype).double()
        D = torch.where(D.abs() < torch.finfo(dtype).max / 4, D, 0.5)
        x, i, j, base = scaled(D, a), np.zeros(40, np.int64), np.arange(40), numbers_of(W).bits[0]
        result = decide(x, base, form, i, j, form)
        fine = np.flatnonzero((result & form.size) < form.inf)
        runs = find_runs(x, result[fine], j[fine], 0, 40, D[0].numpy()[fine], 0.0, form)
        first, count = runs.start.astype(np.int64), runs.count.astype(np.int64)
        whole, places = count == every(form), place(base, form)[fine]
        assert (whole | ((first <= places) & (places < first + count))).all()
        keeps = np.array([x.keeps(0, int(k)) for k in j])[fine]
        for at, inside in ((first, True), (first + count - 1, True), (first - 1, False), (first + count, False)):
            some = np.flatnonzero(~whole & (at >= -form.inf) & (at < form.inf) & ~keeps)
            made = decide(x, number(at[some], form), form, i[some], j[fine][some], form)
            assert ((made == result[fine][some]) == inside).all()
        zero = decide(x, np.zeros(len(fine), form.bits_type), form, i[: len(fine)], j[fine], form)
        assert (whole == (((zero == result[fine]) | (a == 0)) & ~keeps)).all()

    def test_rows_under_two_updates(self) -> None:
        """Half replaced, and added to: what `near` gives is a sum of both."""
        (A, B), form = factors(2, 12, 2), form_of(BF16)
        x = Reals(Sum([Stored(weights(2, 12, dtype=FP16), 0.5), product_of(A, B, 0.1).delta]), HALVES)
        for j in (0, 7):
            found = brute_force(x, 1, j, BF16)
            nothing, at = np.full(len(found.result), np.nan), np.full(len(found.result), 12 + j)
            runs = find_runs(x, found.result, at, 0, 12, nothing, 0.0, form)
            assert (runs.count == np.where(found.holds_zero, every(form), found.count)).all()
            assert (runs.start == found.start)[~found.holds_zero].all()


HALVES = Factor.of_rows([Fraction(1, 2)] * 2)


class TestDoubts:
    @shortest
    @pytest.mark.parametrize("size", [0.0, 1e-3, 0.03, 2.0])
    def test_what_subtracting_leaves_in_doubt(self, dtype: torch.dtype, size: float) -> None:
        """It is what several W could have been, as brute force counts them."""
        W, (A, B) = weights(1, 6, dtype=dtype), factors(1, 6, 2)
        W[0, 0], W[0, 1] = 0.0, -0.0
        forward = product_of(A, B, size * 7)
        out, _ = merged(W, forward)
        back = torch.empty_like(W)
        doubted = subtract(numbers_of(out), forward, numbers_of(back), Workspace())
        sizes, few = [], [1]
        for k, result in enumerate(numbers_of(out).bits.reshape(-1)):
            found = brute_force(forward, 0, k, dtype)
            at = int(np.flatnonzero(found.result == result)[0])
            sizes.append(found.count[at])
            few += [found.count[at]] if not found.holds_zero[at] or size == 0 else []
        assert doubted.doubtful == sum(count > 1 for count in sizes)
        assert doubted.farthest == max(few) - 1
        wrong = bits(back) != bits(W)
        assert wrong.view(-1, dtype.itemsize).any(1).sum() <= doubted.doubtful

    def test_float64_is_in_doubt_wherever_something_is_added(self) -> None:
        W, (A, B) = numbers_of(weights(3, 30, dtype=FP64)), factors(3, 30, 2)
        B[1] = 0
        doubted = subtract(W, product_of(A, B, 1.0), Numbers.empty(W.form, *W.shape), Workspace())
        assert (doubted.doubtful, doubted.farthest) == (60, 1)


def refusal(dtype: torch.dtype, payload: bytes, work: Callable[[Restorer], object]) -> str:
    """Return what is wrong with a record."""
    restorer = Restorer("x", form_of(dtype), payload, 0)
    with pytest.raises(InputError, match="x: cannot be restored: its record") as caught, restorer.damage():
        work(restorer)
    return str(caught.value)


class TestBrokenRecords:
    @shorter
    def test_bits_too_few_too_many_or_in_the_padding(self, dtype: torch.dtype) -> None:
        W, (A, B) = weights(5, 37, dtype=dtype), factors(5, 37, 2)
        W[2] = 0.0
        W[3, 3:] = -0.0
        x = product_of(A, B, 40.0)
        out, record = merged(W, x)
        data = record.payload
        assert len(data) > 20

        def block(restorer: Restorer) -> None:
            restorer.block(numbers_of(out), x, numbers_of(torch.empty_like(W)), Workspace())

        for end in (0, 1, len(data) // 2, len(data) - 1):
            assert "ends too early" in refusal(dtype, data[:end], block)
        assert "longer than it should be" in refusal(dtype, data + b"\0", block)

    def test_padding_that_is_not_zero(self) -> None:
        """A run of five numbers takes three bits, and leaves five."""
        W = torch.tensor([[1.0]], dtype=BF16)
        x = scaled(torch.full((1, 1), 4.0))
        out, record = merged(W, x)
        assert record.payload == b"\4"
        result = numbers_of(out)
        for bit in (3, 5, 7):
            padded = bytes([record.payload[0] | 1 << bit])
            text = refusal(BF16, padded, lambda r: r.block(result, x, Numbers.empty(result.form, 1, 1), Workspace()))
            assert "longer than it should be" in text

    @types
    def test_differences(self, dtype: torch.dtype) -> None:
        size, count, kind = 8 * dtype.itemsize, 11, INTEGERS[dtype.itemsize]
        out = numbers_of(weights(1, count, dtype=dtype))
        change = torch.arange(count).to(kind).numpy()
        data, back = pack_differences(change), Numbers.empty(out.form, *out.shape)
        assert data[0] == 5 and len(data) == 1 + (5 * count + 7) // 8

        def replaced(restorer: Restorer) -> None:
            restorer.replaced(out, back, Workspace())

        assert f"has numbers of {size + 1} bits" in refusal(dtype, bytes([size + 1]) + bytes(1000), replaced)
        assert "has numbers of 255 bits" in refusal(dtype, b"\xff" + bytes(1000), replaced)
        for end in range(len(data)):
            assert "ends too early" in refusal(dtype, data[:end], replaced)
        assert "longer than it should be" in refusal(dtype, data[:-1] + bytes([data[-1] | 0x80]), replaced)
        longer = Restorer("x", out.form, data + b"\0", 0)
        longer.replaced(out, back, Workspace())
        with pytest.raises(InputError, match="x: "):
            longer.check(out)

    def test_the_largest_differences(self) -> None:
        """A difference of places may need one bit more than its type has; taken modulo 2**n it is right."""
        change = np.array([2**63 - 1, -(2**63), -1, 0, 1])
        assert (Reader(pack_differences(change)).differences(5, np.int64) == change).all()

    @pytest.mark.parametrize(
        ("numbers", "data"),
        [([5, -3, 2], [4, 0x5A, 0x04]), ([0] * 99 + [-300], [255, 1, 0, 0, 0, 8, 198, 10, 599 & 255, 599 >> 8])],
    )
    def test_differences_of_codes(self, numbers: list[int], data: list[int]) -> None:
        assert pack_code_differences(np.array(numbers, np.int16)) == bytes(data)
        assert Reader(bytes(data)).code_differences(len(numbers)).tolist() == numbers
        for end in range(len(data)):
            with pytest.raises(ValueError, match="ends too early"):
                Reader(bytes(data[:end])).code_differences(len(numbers))
        with pytest.raises(ValueError, match="longer than it should be"):
            Reader(bytes([*data[:-1], data[-1] | 0x80])).code_differences(len(numbers))

    @pytest.mark.parametrize("norm", [float("nan"), float("inf"), -float("inf")])
    def test_norms_that_are_none(self, norm: float) -> None:
        data = struct.pack("<3d", 1.0, norm, 2.0)
        assert "has invalid norms" in refusal(BF16, data, lambda restorer: restorer.norms(3))
        assert "ends too early" in refusal(BF16, data, lambda restorer: restorer.norms(4))

    def test_another_weight_or_another_result(self) -> None:
        """The sum is of W'; that W is another only the whole file tells (`TestRefusals` of unmerge)."""
        W, (A, B) = weights(4, 50, dtype=BF16), factors(4, 50, 2)
        x = product_of(A, B, 1.0)
        out, record = merged(W, x)
        edited = out.clone()
        edited[1, 1] *= 2
        with pytest.raises(InputError, match=r"x: (is not what the merge wrote|cannot be restored)"):
            restored(edited, x, record)
        with suppress(InputError):
            assert not torch.equal(restored(out, product_of(A, B, 1.01), record), W)
        assert torch.equal(restored(out, x, record), W)


SMALL = {
    "none": [],
    "zeros": [0] * 5,
    "one": [0, 0, -3],
    "few": ([0] * 2000 + [7, -510]) * 9,
    "often": [0, 0, 1, 0, -1] * 900,
    "some large": ([1, -1, 0] * 300 + [255, -255]) * 9,
    "all sizes": list(range(-255, 256)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_differences_come_back_from_all_their_bits(name: str) -> None:
    """And no bit of the padding is anything but 0."""
    numbers = np.array(SMALL[name], np.int16)
    data = pack_code_differences(numbers)
    reader = Reader(data)
    assert np.array_equal(reader.code_differences(len(numbers)), numbers) and reader.rest == 0
    for at in range(0, len(data), max(1, len(data) // 50)):
        with pytest.raises(ValueError, match="ends too early"):
            Reader(data[:at]).code_differences(len(numbers))
        for bit in range(8):
            flipped = bytes([*data[:at], data[at] ^ 1 << bit, *data[at + 1 :]])
            try:
                reader = Reader(flipped)
                assert not np.array_equal(reader.code_differences(len(numbers)), numbers) or reader.rest
            except ValueError:
                pass
