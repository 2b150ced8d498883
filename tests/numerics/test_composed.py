"""Hold deltas of deltas against fractions: bounds, merges of hostile weights, and the way back by a record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from lib.hostile.hostile_reals import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    SHAPE,
    M,
    N,
    changes,
    every_place,
    flushing,
    form_of,
    hard_terms,
    hard_weights,
    id_of,
    merge_rows,
    normal,
    reals,
)
from lib.oracles.fractions_oracle import Add, DoRA, codes, count_wrong, merge_codes
from torch import Tensor

from loratool.numerics.arrays import ON_CPU, Array, Kind, Numbers
from loratool.numerics.composed import Hadamard, Kron, Scaled
from loratool.numerics.decide import Delta, DenseDelta, Factor, Reals
from loratool.numerics.forms import Positions, Wide
from loratool.numerics.merge import RowMerge
from loratool.numerics.norms import column_norms, magnitude_ratio, row_norms
from loratool.numerics.products import Products, Term
from loratool.numerics.stored import Stored, Sum, Zero
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.undo.records import Recorder, Restorer

THIRD = F(1 / 3)
SCALES = [F(1), THIRD, F(-1, 4), F(0), F(2) ** 40, F(2) ** -1070]


@dataclass(frozen=True)
class Case:
    """A delta of (M, N), and its numbers."""

    delta: Delta
    numbers: list[F]


def products(terms: Sequence[Term]) -> Delta:
    return Products(terms).rows(0, len(terms[0].left))


def hadamard(one: Sequence[Term], two: Sequence[Term], scale: F) -> Case:
    numbers = [scale * x * y for x, y in zip(changes(one), changes(two), strict=True)]
    return Case(Hadamard(products(one), products(two), scale), numbers)


def kron_numbers(one: list[F], two: list[F], shapes: tuple[tuple[int, int], tuple[int, int]], scale: F) -> list[F]:
    (m, n), (p, q) = shapes
    return [scale * one[(i // p) * n + j // q] * two[(i % p) * q + j % q] for i in range(m * p) for j in range(n * q)]


def kron(factor: torch.dtype, scale: F, rows: slice | None = None, stored: str = "12") -> Case:
    """Return (2, 4) by (3, 4), or rows of it, each stored or a product."""
    g = np.random.default_rng(4)
    parts: list[tuple[Delta, list[F]]] = []
    for name, m, n in (("1", 2, 4), ("2", 3, 4)):
        V, terms = (
            normal(g, m, n, dtype=factor),
            [Term(normal(g, m, 2, dtype=factor), normal(g, 2, n, dtype=factor), F(1))],
        )
        V[0, 1] = 0
        V[1, :2] = 1.5
        parts.append((Stored(V, 1.0), reals(V)) if name in stored else (products(terms), changes(terms)))
    (one, x), (two, y) = parts
    numbers = kron_numbers(x, y, (one.shape, two.shape), scale)
    rows = rows or slice(0, M)
    return Case(Kron(one, two, scale, rows), numbers[rows.start * N : rows.stop * N])


def scaled(case: Case, numbers: list[F], axis: int) -> Case:
    ratio = (Factor.of_columns if axis else Factor.of_rows)(numbers)
    found = [numbers[(k // N, k % N)[axis]] * x for k, x in enumerate(case.numbers)]
    return Case(Scaled(case.delta, ratio), found)


def added(*cases: Case) -> Case:
    return Case(
        Sum([case.delta for case in cases]), [sum(each, F(0)) for each in zip(*(c.numbers for c in cases), strict=True)]
    )


RATIOS = {
    0: [F(1, 3), F(1), F(0), F(-1), F(7) ** 3, F(2) ** -900 / 3],
    1: [F(k - 4, 3) for k in range(N)],
}


def cases_of(factor: torch.dtype, step: float = 2.0**-9) -> dict[str, Callable[[], Case]]:
    """Return deltas by what is hard about them. step: of the weights' type near the weights, for ties."""
    terms = hard_terms(factor, step)
    tiny = [Term(x.left, x.right, F(1)) for x in hard_terms(BF16)["third"]]
    one = [Term(torch.ones(M, 1), torch.ones(1, N), F(1))]
    return {
        **{f"loha {name}": lambda name=name: hadamard(terms[name], tiny, THIRD) for name in terms},
        **{f"loha by {k}": lambda k=k: hadamard(terms["third"], terms["two"], SCALES[k]) for k in range(len(SCALES))},
        "loha ties": lambda: hadamard(terms["ties"], one, F(1)),
        "loha near ties": lambda: hadamard(terms["near ties"], one, F(-1)),
        "loha of what nearly cancels": lambda: hadamard(terms["nearly cancel"], terms["nearly cancel"], F(2) ** 60),
        "loha of sums": lambda: Case(
            Hadamard(added(hadamard(terms["third"], tiny, THIRD), kron(factor, F(1))).delta, products(tiny), F(2)),
            [2 * x * y for x, y in zip(
                added(hadamard(terms["third"], tiny, THIRD), kron(factor, F(1))).numbers, changes(tiny), strict=True
            )],
        ),
        **{f"lokr by {k}": lambda k=k: kron(factor, SCALES[k]) for k in range(len(SCALES))},
        "lokr of products": lambda: kron(factor, THIRD, stored=""),
        "lokr of one product": lambda: kron(factor, F(1), stored="1"),
        "rows": lambda: scaled(hadamard(terms["third"], tiny, THIRD), RATIOS[0], 0),
        "columns": lambda: scaled(kron(factor, F(1)), RATIOS[1], 1),
        "columns that cancel": lambda: scaled(
            Case(products(terms["nearly cancel"]), changes(terms["nearly cancel"])), RATIOS[1], 1
        ),
        "zero and others": lambda: added(
            Case(Zero(SHAPE), [F(0)] * (M * N)),
            kron(factor, THIRD),
            Case(products(terms["two"]), changes(terms["two"])),
        ),
        "cancel": lambda: added(hadamard(terms["third"], tiny, F(3)), hadamard(tiny, terms["third"], F(-3))),
    }  # fmt: skip


NAMES_OF_CASES = list(cases_of(BF16))


def beyond(delta: Delta, numbers: list[F], slack: float = 1.0) -> list[str]:
    """Return the answers that are off by more than their bound times `slack`."""
    (m, n), (i, j), found = delta.shape, every_place(delta.shape), []
    for name in ("near", "nearer"):
        high, low, bound = getattr(delta, name)(i, j)
        assert not np.isnan(bound).any() and np.isfinite(high).all() and np.isfinite(low).all()
        for k, number in enumerate(numbers):
            reach = F(float(bound[k])) * F(slack) if np.isfinite(bound[k]) else None
            if reach is not None and abs(F(float(high[k])) + F(float(low[k])) - number) > reach:
                found.append(f"{name} of {k}")
    for kind in (np.float32, np.float64):
        if kind == np.float32 and not delta.largest < 2.0**60:
            continue
        dense = delta.dense(kind, ON_CPU)
        assert not np.isnan(dense.sizes).any() and not np.isnan(dense.errors).any()
        for rows, shift in ((slice(0, m), 0.0), (slice(1, m - 1), 0.125)):
            out = np.empty((rows.stop - rows.start, n), kind)
            dense.fill(rows, shift, out)
            of = numbers[rows.start * n : rows.stop * n]
            for k, (number, x) in enumerate(zip(of, reals(torch.from_numpy(out)), strict=True)):
                row, rounding = rows.start + k // n, F(0)
                if shift:
                    rounding = (abs(number) + F(shift)) * F(float(np.finfo(kind).eps)) / 2
                error, size = dense.errors[row], dense.sizes[row]
                if np.isfinite(error) and abs(x - F(shift) - number) > F(float(error)) * F(slack) + rounding:
                    found.append(f"dense {kind.__name__} of {k}")
                if np.isfinite(size) and abs(number) > F(float(size)) * (1 + F(1, 10**12)) + F(2) ** -900:
                    found.append(f"size {kind.__name__} of {k}")
    return found


def check_bounds(name: str, factor: torch.dtype) -> None:
    make = cases_of(factor)[name]
    case = make()
    i, j = every_place(case.delta.shape)
    assert [case.delta.exact(int(a), int(b)) for a, b in zip(i[::7], j[::7], strict=True)] == case.numbers[::7]
    assert beyond(case.delta, case.numbers) == []
    with flushing():
        assert beyond(make().delta, case.numbers) == []


@pytest.mark.parametrize(
    ("name", "factor"), list(zip(NAMES_OF_CASES, itertools.cycle(DTYPES), strict=False)), ids=id_of
)
def test_no_error_is_beyond_its_bound(name: str, factor: torch.dtype) -> None:
    """Where subnormal numbers are flushed too."""
    check_bounds(name, factor)


@pytest.mark.slow
@pytest.mark.parametrize("factor", DTYPES, ids=id_of)
@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_no_error_is_beyond_its_bound_for_any_type(name: str, factor: torch.dtype) -> None:
    check_bounds(name, factor)


def test_a_scale_next_to_a_power_of_two() -> None:
    """Of a weight and a scale, which float64 has as -1/2."""
    scale, (one, two) = F(0.3) * F(-5 / 3), (torch.full((2, 4), x, dtype=FP64) for x in (1 / 3, 1 / 7))
    assert beyond(Hadamard(Off(one, 0.0), Off(two, 0.0), scale), [F(1 / 3) * F(1 / 7) * scale] * 8) == []


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("loha third", ("near of", "nearer", "float32", "float64")),
        ("lokr of products", ("nearer", "float32", "float64")),
        ("rows", ("near of",)),
        ("rows of products", ("float32", "float64")),
        ("columns", ("float32", "float64")),
    ],
)
def test_bounds_of_a_hundredth_show(name: str, answers: tuple[str, ...]) -> None:
    """Else the data of these tests would not tell a bound that is too small."""
    cases = cases_of(FP32)
    cases["rows of products"] = lambda: scaled(kron(FP32, THIRD, stored=""), RATIOS[0], 0)  # farther off than "rows"
    case = cases[name]()
    found = " ".join(beyond(case.delta, case.numbers, 0.01))
    assert all(answer in found for answer in answers)


@dataclass(frozen=True)
class Off:
    """A delta whose answers are as far off as they say, to where it counts most; numbers: float64, above `off`."""

    numbers: Tensor
    off: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.numbers.shape[0], self.numbers.shape[1]

    @property
    def largest(self) -> float:
        return float(self.numbers.abs().max())

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        def fill(rows: slice, shift: float, out: Array) -> None:
            out[...] = self.numbers[rows].numpy() + self.off + shift

        return DenseDelta(self.numbers.abs().amax(1).numpy(), np.full(len(self.numbers), self.off), fill)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return self.numbers.numpy()[i, j] - self.off, np.zeros(len(i)), np.full(len(i), self.off)

    nearer = near

    def exact(self, i: int, j: int) -> F:
        return F(float(self.numbers[i, j]))


@pytest.mark.parametrize("offs", [(0.125, 0.0), (0.0, 0.125), (0.125, 0.25)])
def test_all_that_the_parts_may_be_off_is_in_the_bound(offs: tuple[float, float]) -> None:
    """And no more than a few roundings besides."""
    one, two = torch.full((2, 4), 3.0, dtype=FP64), torch.full((3, 4), 2.0, dtype=FP64)
    ratio = Factor.of_rows([F(5)] * 2)
    cases = [
        (Hadamard(Off(one, offs[0]), Off(one, offs[1]), F(-4)), [F(-36)] * 8),
        (Kron(Off(one, offs[0]), Off(two, offs[1]), F(1, 2), slice(1, 5)), [F(3)] * 64),
        (Scaled(Off(one, sum(offs)), ratio), [F(15)] * 8),
    ]
    for delta, numbers in cases:
        assert beyond(delta, numbers) == []
        assert len(beyond(delta, numbers, 0.99)) >= 4 * len(numbers)


def test_what_is_zero_is_known_to_be() -> None:
    """So that -0.0 stays without a fraction; in rows, columns and scales of 0, whatever the other part is."""
    case = cases_of(FP32)["loha zero rows"]()
    high, low, bound = case.delta.near(*every_place())
    dead = np.array([x == 0 for x in case.numbers])
    assert dead.sum() > 40 and not (high[dead].any() or low[dead].any() or bound[dead].any()) and bound[~dead].all()
    for name in ("loha by 3", "lokr by 3"):
        assert not any(x.any() for x in cases_of(FP32)[name]().delta.near(*every_place()))
    unknown = Scaled(products(hard_terms(BF16)["third"]), Factor.of_rows([F(2) ** -800] * M))
    nothing = products([Term(torch.zeros(M, 1), torch.zeros(1, N), F(1))])
    assert np.isinf(unknown.near(*every_place())[2]).all()
    assert not Hadamard(unknown, nothing, THIRD).near(*every_place())[2].any()


@dataclass(frozen=True)
class Times:
    """X = a W, a of each element."""

    a: list[F]

    def parts(self, W: list[F | None], columns: int) -> tuple[list[F], list[F]]:
        return self.a, [F(0)] * len(W)


def comes_back(W: Tensor, x: Reals) -> bool:
    """Return whether a record of the merge restores W."""
    base, restored, form = numbers_of(W), torch.empty_like(W), form_of(W.dtype)
    out, back, recorder = Numbers.empty(form, *W.shape), numbers_of(restored), Recorder(form)
    stats = RowMerge(x, form, form).apply(base, 0, out, Workspace(), recorder)
    record = recorder.result(stats, out)
    restorer = Restorer("x", form, record.payload, record.sum)
    with restorer.damage():
        restorer.block(out, x, back, Workspace())
    restorer.check(out)
    return codes(restored) == codes(W)


def fitting(W: Tensor, numbers: list[F], out: torch.dtype) -> Tensor:
    """Return W with 1 where the sum would overflow."""
    top = F(torch.finfo(out).max)
    fits = [not torch.isfinite(w) or abs(F(float(w)) + x) <= top for w, x in zip(W.flatten(), numbers, strict=True)]
    return torch.where(torch.tensor(fits).reshape(W.shape), W, torch.ones_like(W))


def check_merge(name: str, weights: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype) -> None:
    make = cases_of(factor, torch.finfo(out).eps)[name]
    case = make()
    W = fitting(hard_weights(base)[weights], case.numbers, out)
    expected = merge_codes(W, out, [Add(case.numbers)])
    for flush in (False, True):
        with flushing(flush):
            delta = make().delta
            found, _ = merge_rows(delta, W, out)
            fits = ~W.isnan().flatten().numpy() if base != out else np.ones(W.numel(), np.bool_)
            assert expected is None or (np.array(codes(found))[fits] == np.array(expected)[fits]).all()
            assert base != out or base.itemsize == 1 or expected is None or comes_back(W, Reals(delta))


MERGES = [
    (name, weights, base, factor, out)
    for name in NAMES_OF_CASES
    for weights in hard_weights(BF16)
    for base in DTYPES
    for factor in DTYPES
    for out in (base, *DTYPES)
]


@pytest.mark.parametrize(("name", "weights", "base", "factor", "out"), MERGES[:: len(MERGES) // 24 | 1], ids=id_of)
def test_merges_are_right(name: str, weights: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype) -> None:
    check_merge(name, weights, base, factor, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_merges_of_all_types_are_right(name: str) -> None:
    for case in MERGES[::7]:
        if case[0] == name:
            check_merge(*case)


@pytest.mark.parametrize("weight", [1.0, -0.7])
@pytest.mark.parametrize("name", ["loha third", "lokr of products", "zero and others", "loha by 3"])
@pytest.mark.parametrize(("base", "factor"), [(BF16, FP32), (FP32, BF16), (FP16, FP64)], ids=id_of)
def test_dora_over_them(base: torch.dtype, factor: torch.dtype, name: str, weight: float) -> None:
    """Rows multiplied by w m / n, W too; norms of a row are those of W + D."""
    case, W = cases_of(factor)[name](), hard_weights(base)["normal"]
    W[2] = 0
    m = normal(np.random.default_rng(8), M, dtype=factor)
    n = row_norms(case.delta, numbers_of(W), Workspace())
    ratio, factor_of_w = magnitude_ratio(m, n, weight, 0)
    delta = Scaled(case.delta, ratio)
    expected = merge_codes(W, base, [DoRA(case.numbers, m, weight)])
    assert codes(merge_rows(delta, W, base, factor_of_w)[0]) == expected
    assert comes_back(W, Reals(delta, factor_of_w))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weights", ["zeros", "subnormal", "largest"])
@pytest.mark.parametrize("base", DTYPES, ids=id_of)
def test_a_multiple_of_w_alone(base: torch.dtype, weights: str, axis: int) -> None:
    """Of 1 - w + w l, 0 and less than float64 has among them; W of inf stays where the multiple is not 0."""
    numbers = [F(1), F(0), F(1) - F(0.3), F(-1, 3), F(2) ** -1080, F(1, 3)] + [F(k, 16) for k in range(10)]
    W = hard_weights(base)[weights]
    W = torch.where(W.isfinite(), W, torch.ones_like(W)) if weights == "zeros" else W
    ratio = (Factor.of_columns if axis else Factor.of_rows)(numbers[: SHAPE[axis]])
    expected = merge_codes(W, base, [Times([numbers[(k // N, k % N)[axis]] for k in range(M * N)])])
    for flush in (False, base != FP64):
        with flushing(flush):
            x = Reals(Zero(SHAPE), ratio)
            assert codes(merge_rows(Zero(SHAPE), W, base, ratio)[0]) == expected
            assert comes_back(W, x)


def test_rows_of_a_kronecker_product_are_those_of_the_whole() -> None:
    whole = kron(FP32, THIRD)
    for start, stop in ((0, 1), (2, 5), (4, 6), (3, 3)):
        part = kron(FP32, THIRD, slice(start, stop))
        assert part.delta.shape == (stop - start, N)
        i, j = every_place(part.delta.shape)
        for one, two in zip(whole.delta.near(i + start, j), part.delta.near(i, j), strict=True):
            assert np.array_equal(one, two)


def test_a_ratio_of_terms_that_cancel_to_their_last_bits() -> None:
    """high is 0 there, and low what is left, so that its product is rounded too."""
    ratio, two = Factor.of_rows([F(1, 3)]), np.array([0, 0])
    low = np.array([2.0**-60 / 7, 2.0**-70 * (1 + 2.0**-50)])
    high, less, bound = ratio.times(np.zeros(2), low, two, two)
    for k in range(2):
        assert abs(F(float(high[k])) + F(float(less[k])) - F(1, 3) * F(float(low[k]))) <= F(float(bound[k]))


def test_sums_of_a_slight_change_are_its_own() -> None:
    """W + D in float32 has lost what is left of D there; one that is 0 has no size."""
    W = hard_weights(BF16)["normal"].abs() + 1
    for size in (1e-4, 1e-6, 0.0):
        terms = [Term(normal(np.random.default_rng(5), M, 1, size=size), torch.ones(1, N, dtype=FP64), F(1))]
        ones = [Term(torch.ones(M, 1), torch.ones(1, N), F(1))]
        _, stats = merge_rows(Hadamard(products(terms), products(ones), F(1)), W, BF16)
        wanted = float(sum(x * x for x in changes(terms)))
        assert stats.change_squared == pytest.approx(wanted, rel=0.01)
        assert stats.change_squared > 0 or size == 0


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_dora_over_channels_of_a_flattened_kernel(weight: float) -> None:
    """One number for each four columns, of the norm of all four."""
    case, W = kron(FP32, THIRD), hard_weights(BF16)["normal"]
    W[:, 4:8], m = 0, normal(np.random.default_rng(9), N // 4, dtype=FP32)
    blocks = [(0, numbers_of(W[:4])), (4, numbers_of(W[4:]))]
    n = column_norms(lambda start, stop: kron(FP32, THIRD, slice(start, stop)).delta, lambda: blocks, Workspace(), 4)
    ratio, factor = (each.repeated(4) for each in magnitude_ratio(m, n, weight, 1))
    groups = [
        [k for k in range(M * N) if k % N // 4 == channel] for channel in range(N // 4)
    ]  # as rows, which the oracle's norms are of
    V = torch.stack([W.flatten()[at] for at in groups])
    turned = [case.numbers[k] for at in groups for k in at]
    wanted = dict(
        zip((k for at in groups for k in at), merge_codes(V, BF16, [DoRA(turned, m, weight)]) or [], strict=True)
    )
    x = Reals(Scaled(case.delta, ratio), factor)
    assert codes(merge_rows(x.delta, W, BF16, factor)[0]) == [wanted[k] for k in range(M * N)]
    assert comes_back(W, x)


@pytest.mark.parametrize("name", ["loha third", "lokr by 0", "rows"])
@pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2], ids=id_of)
def test_results_of_8_bits(form: torch.dtype, name: str) -> None:
    """Of weights that 8 bits hold, as streaming widens them, and of others."""
    case, g = cases_of(FP32)[name](), np.random.default_rng(6)
    for W in (normal(g, *SHAPE, size=0.5).to(form).float(), normal(g, *SHAPE, dtype=BF16)):
        W[0, :2] = torch.tensor([-0.0, np.nan])
        expected = merge_codes(W, form, [Add(case.numbers)])
        assert expected and count_wrong(merge_rows(case.delta, W, form)[0], expected) == 0
