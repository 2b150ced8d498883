"""Hold each step that changes numbers against fractions, dense float64 matrices and torch's SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import TYPES, WIDTH, Factors, drawn, made_rows, opened, relative, rows_of, small_integers
from torch import Tensor

from loratool.adapters.adapter import Adapter
from loratool.errors import InputError, LoratoolError, NeedsFlag
from loratool.numerics.forms import BF16, F16, F32, F64, Form
from loratool.transform.lazy import LazyFile, Transformed, start
from loratool.transform.log import NO_LOSS, Loss
from loratool.transform.numbers import (
    alpha_for_scale,
    cut_ranks,
    fold,
    one_scale,
    pad,
    settle,
    subtract_start,
    with_scales,
)

STEPS = (fold, one_scale, lambda state: cut_ranks(state, 1), lambda state: pad(state, lambda module: 6))
NOISE = 4e-15  # of float64's QR and SVD
# a plain layer, a stack of experts, a convolution
KINDS = {"plain": {}, "stack": {"experts": 3}, "kernel": {"kernel": (3, 3)}}
kinds = pytest.mark.parametrize("kind", KINDS)
types = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)


def one(tmp_path: Path, each: Factors) -> Transformed:
    return start(opened(tmp_path, {"m": each}))


def loss(state: Transformed, module: str = "m") -> Loss:
    file = state.adapter.file
    return file.loss(module) if isinstance(file, LazyFile) else NO_LOSS


def tensors(adapter: Adapter, module: str = "m") -> dict[str, Tensor]:
    return {role: adapter.file.tensor(name) for role, name in adapter.updates[module].tensors.items()}


def with_scale(state: Transformed, scale: float) -> Transformed:
    updates = {"m": replace(state.adapter.updates["m"], scale=scale)}
    return replace(state, adapter=replace(state.adapter, updates=updates))


def exact_products(B: Tensor, old: float, made: Tensor, new: float) -> bool:
    """Return whether the scaled numbers are the same real numbers."""
    pairs = zip(B.flatten().tolist(), made.flatten().tolist(), strict=True)
    return all(Fraction(b) * Fraction(old) == Fraction(c) * Fraction(new) for b, c in pairs)


class TestScales:
    @types
    @pytest.mark.parametrize("old", [1.0, 0.75, 3.0, -1.5, 1 / 3, 0.1, 2.0**-40, 0.0])
    def test_another_is_exact_just_where_fractions_say_so(self, dtype: torch.dtype, old: float, tmp_path: Path) -> None:
        each = drawn(4, 3, dtype=dtype, alpha=3.0)
        source = with_scale(one(tmp_path, each), old)
        for new in (1.0, 0.5, 0.75, 3.0, 1 / 3):
            state = with_scales(source, lambda update, new=new: (new, update.scale / new))
            made, found = tensors(state.adapter), loss(state)
            same = exact_products(each.B, old, made["B"], new)
            assert (found.squared == 0) is same and not found.cut
            assert found.relative < NOISE and torch.equal(made["A"].double(), each.A.double())
            assert state.adapter.updates["m"].scale == new
            if old:
                assert relative(made_rows(state.adapter, "m"), rows_of(replace(each, alpha=3 * old))) < NOISE
            word = "exact" if old == new else "folded"
            assert settle(state, F64).log["m"].how == ("rounded" if found.squared else word)

    @kinds
    def test_of_any_kind_and_of_two_in_a_row(self, kind: str, tmp_path: Path) -> None:
        """float64 holds the product of bf16 with 3 and with 0.75, though not that of all its numbers with them."""
        each = drawn(6, 2, dtype=torch.bfloat16, alpha=9.0, **KINDS[kind])
        state = with_scales(one(tmp_path, each), lambda update: (1.5, 3.0))
        state = fold(with_scales(state, lambda update: (2.0, 0.75)))
        assert exact_products(each.B, 4.5, tensors(state.adapter)["B"], 1.0)
        assert loss(state).squared == 0 and settle(state, F64).log["m"].how == "folded"
        assert torch.equal(made_rows(state.adapter, "m"), rows_of(each))

    def test_a_power_of_two_after_a_cut_rounds_nothing_more(self, tmp_path: Path) -> None:
        """The factors of an SVD have all bits of float64."""
        state = cut_ranks(one(tmp_path, small_integers(6, 3, 1, torch.float32, 3.0)), 2)
        once = with_scales(state, lambda update: (2.0, 0.5))
        assert loss(once) == loss(state)

    def test_the_one_of_most_modules(self, tmp_path: Path) -> None:
        """A scale of 0 is none; modules that have the common one keep their tensors."""
        alphas = {"a": 4.0, "b": 6.0, "c": 6.0, "d": 0.0, "e": 0.0, "f": 0.0}
        modules = {m: drawn(4, 2, seed, alpha=alpha) for seed, (m, alpha) in enumerate(alphas.items())}
        state = one_scale(start(opened(tmp_path, modules)))
        assert {update.scale for update in state.adapter.updates.values()} == {3.0}
        for module, each in modules.items():
            made = made_rows(state.adapter, module)
            assert torch.allclose(made, rows_of(each), rtol=1e-14, atol=0) and made.any() == bool(each.alpha)
            assert (state.log[module].how == "exact") is (module in "bc")
        assert loss(state, "d") == NO_LOSS and loss(state, "a").relative > 0  # 2 / 3 is no number of float64

    def test_of_zeros_alone_is_1(self, tmp_path: Path) -> None:
        state = one_scale(one(tmp_path, drawn(4, 2, alpha=0.0)))
        assert state.adapter.updates["m"].scale == 1.0 and not made_rows(state.adapter, "m").any()
        assert loss(state) == NO_LOSS

    def test_a_fold_of_nothing_changes_nothing(self, tmp_path: Path) -> None:
        source = one(tmp_path, drawn(4, 2, alpha=2.0))
        assert fold(source) is source and one_scale(source) is source

    def test_one_that_float64_does_not_hold_is_refused_by_the_modules_name(self, tmp_path: Path) -> None:
        state = fold(with_scale(one(tmp_path, replace(drawn(4, 2), B=torch.full((4, 2), 1e30))), 1e300))
        with pytest.raises(InputError, match="overflow") as caught:
            settle(state, None)
        assert caught.value.culprit == "m"

    @settings(max_examples=100)
    @given(st.floats(1e-30, 1e30), st.integers(1, 512))
    def test_an_alpha_is_found_if_a_neighbour_gives_the_scale(self, scale: float, rank: int) -> None:
        alpha = alpha_for_scale(scale, rank)
        exact = Fraction(scale) * rank
        assert abs(Fraction(alpha) - exact) <= exact / 2**23
        if alpha / rank != scale:
            tried = [float(exact)]
            for _ in range(3):
                tried = [math.nextafter(tried[0], 0.0), *tried, math.nextafter(tried[-1], math.inf)]
            assert all(each / rank != scale for each in tried)


class TestBiases:
    def settled(self, tmp_path: Path, value: float, dtype: torch.dtype, alpha: float) -> tuple[Transformed, Tensor]:
        bias = torch.linspace(value / 2, value, 4).to(dtype)
        state = fold(one(tmp_path, replace(drawn(4, 2, alpha=alpha), others={"lora_B.bias": bias})))
        made = settle(state, None)
        return made, bias

    @pytest.mark.parametrize(("alpha", "how"), [(1.0, "folded"), (6.0, "folded"), (0.2, "rounded")])
    def test_say_what_their_scale_rounds(self, alpha: float, how: str, tmp_path: Path) -> None:
        made, bias = self.settled(tmp_path, 1.7, torch.bfloat16, alpha)
        value = tensors(made.adapter, "m.bias")["value"]
        true = alpha / 2 * bias.double()
        change = made.log["m.bias"]
        assert change.how == how and made.adapter.updates["m.bias"].scale == 1.0
        assert change.loss.relative == pytest.approx(relative(value.double(), true), rel=1e-6) and value.dtype == (
            torch.float32
        )
        assert change.loss.relative < 1e-7

    def test_that_overflow_are_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="overflows") as caught:
            self.settled(tmp_path, 3e38, torch.float32, 5.0)
        assert caught.value.culprit == "m.bias"


class TestSubtraction:
    @kinds
    @pytest.mark.parametrize(
        ("scales", "how"), [((0.75, 0.75), "exact"), ((2.0, 3.0), "exact"), ((0.2, 1 / 3), "rounded")]
    )
    def test_is_the_difference_of_both(self, kind: str, scales: tuple[float, float], how: str, tmp_path: Path) -> None:
        """At one scale the numbers are the files'; bf16, fp16 and small multiples of both are in float32."""
        trained = drawn(6, 2, 1, torch.bfloat16, 2 * scales[0], **KINDS[kind])
        initial = drawn(6, 3, 2, torch.float16, 3 * scales[1], **KINDS[kind])
        state = subtract_start(one(tmp_path / "a", trained), opened(tmp_path / "b", {"m": initial}))
        made = settle(state, None)
        true = rows_of(trained) - rows_of(initial)
        assert made.adapter.updates["m"].rank == 5
        assert relative(made_rows(made.adapter, "m"), true) <= made.log["m"].loss.relative + NOISE
        assert made.adapter.config.peft["init_lora_weights"] is True
        assert made.log["m"].how == how
        if how == "rounded":
            error = relative(made_rows(made.adapter, "m"), true)
            assert made.log["m"].loss.relative == pytest.approx(error, rel=1e-3)

    def test_of_what_hardly_moved_tells_how_little_float64_knows(self, tmp_path: Path) -> None:
        initial = drawn(6, 2, 1, alpha=0.7)
        trained = replace(initial, B=initial.B * (1 + 2**-20), alpha=0.2)
        trained = replace(trained, B=(trained.B.double() * 3.5).float())
        state = subtract_start(one(tmp_path / "a", trained), opened(tmp_path / "b", {"m": initial}))
        exact_B = [Fraction(b) * Fraction(trained.scale) for b in trained.B[0].tolist()]
        exact_B0 = [Fraction(b) * Fraction(initial.scale) for b in initial.B[0].tolist()]
        column = [Fraction(a) for a in initial.A[:, 0].tolist()]
        true = sum(((b - c) * a for b, c, a in zip(exact_B, exact_B0, column, strict=True)), Fraction(0))
        made = tensors(state.adapter)
        found = sum(
            (
                Fraction(b) * Fraction(a)
                for b, a in zip(made["B"][0].tolist(), made["A"][:, 0].double().tolist(), strict=True)
            ),
            Fraction(0),
        ) * Fraction(state.adapter.updates["m"].scale)
        said = loss(state).relative
        assert 1e-12 < said < 1e-9  # 1e-16 of each, of which a millionth is left
        assert abs(float((found - true) / true)) < 10 * said

    def test_of_a_dora_keeps_its_magnitude(self, tmp_path: Path) -> None:
        magnitude = torch.rand(6) + 1
        trained = replace(drawn(6, 2, 1), others={"lora_magnitude_vector": magnitude})
        initial = drawn(6, 2, 2)
        made = settle(subtract_start(one(tmp_path / "a", trained), opened(tmp_path / "b", {"m": initial})), None)
        assert torch.equal(tensors(made.adapter)["magnitude"], magnitude)
        assert relative(made_rows(made.adapter, "m"), rows_of(trained) - rows_of(initial)) < NOISE

    def test_leaves_what_had_no_start(self, tmp_path: Path) -> None:
        modules = {"m": drawn(6, 2, 1), "n": drawn(6, 2, 2)}
        state = subtract_start(start(opened(tmp_path / "a", modules)), opened(tmp_path / "b", {"n": modules["n"]}))
        assert torch.equal(made_rows(state.adapter, "m"), rows_of(modules["m"]))
        assert made_rows(state.adapter, "n").norm() < 1e-14 and state.adapter.updates["m"].rank == 2


class TestCuts:
    @kinds
    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_are_the_best_of_their_rank(self, kind: str, rank: int, tmp_path: Path) -> None:
        each = drawn(8, 5, alpha=1.7, **KINDS[kind])
        state = cut_ranks(one(tmp_path, each), rank)
        true = rows_of(each)
        matrices = true.view(max(1, each.experts), 8, -1)
        S = torch.linalg.svdvals(matrices)
        best = math.sqrt(float(S[:, rank:].square().sum() / S.square().sum()))
        found, made = loss(state), made_rows(state.adapter, "m")
        assert found.cut and found.relative == pytest.approx(best, rel=1e-12)
        assert relative(made, true) == pytest.approx(best, rel=1e-9)
        assert state.adapter.updates["m"].rank == rank and state.adapter.updates["m"].scale == 1.0
        rows = (made - true).square().sum(1)
        by_rows = state.adapter.file.loss("m", by_rows=True).rows
        assert torch.allclose(torch.from_numpy(by_rows), torch.stack([rows, true.square().sum(1)]), rtol=1e-9)

    def test_raise_no_rank(self, tmp_path: Path) -> None:
        modules = {"a": drawn(8, 2), "b": drawn(8, 3, 1), "c": drawn(8, 4, 2)}
        source = start(opened(tmp_path, modules))
        state = cut_ranks(source, 3)
        assert {m: u.rank for m, u in state.adapter.updates.items()} == {"a": 2, "b": 3, "c": 3}
        assert {m: c.how for m, c in settle(state, None).log.items()} == {"a": "exact", "b": "exact", "c": "truncated"}
        assert cut_ranks(source, 4) is source

    @pytest.mark.parametrize("same", [True, False])
    def test_of_directions_that_are_none_are_roundings(self, same: bool, tmp_path: Path) -> None:
        each = drawn(8, 4)
        B = torch.cat([each.B[:, :2], each.B[:, :2] if same else torch.zeros(8, 2)], 1)
        made = settle(cut_ranks(one(tmp_path, replace(each, B=B)), 2), F64)
        assert made.log["m"].how == "rounded" and made.log["m"].loss.relative < NOISE
        assert relative(made_rows(made.adapter, "m"), rows_of(replace(each, B=B))) < NOISE

    def test_keep_a_magnitude(self, tmp_path: Path) -> None:
        magnitude = torch.rand(8) + 1
        each = replace(drawn(8, 4), others={"lora_magnitude_vector": magnitude})
        made = settle(cut_ranks(one(tmp_path, each), 2), BF16)
        assert torch.equal(bits(tensors(made.adapter)["magnitude"]), bits(magnitude))
        error = relative(made_rows(made.adapter, "m"), rows_of(each))
        assert made.log["m"].loss.relative == pytest.approx(error, rel=1e-3)


class TestPadding:
    @kinds
    @types
    def test_adds_zeros_and_no_bit_else(self, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
        each = drawn(6, 2, dtype=dtype, alpha=0.7, **KINDS[kind])
        source = one(tmp_path, each)
        state = pad(source, lambda module: 5)
        made = settle(state, None)
        update = made.adapter.updates["m"]
        assert not state.measured("m") and made.log["m"].how == "exact" and update.scale == each.scale
        assert {tensor.dtype for tensor in tensors(made.adapter).values()} == {dtype} and update.rank == 5
        A, B = (tensors(made.adapter)[role] for role in "AB")
        E = max(1, each.experts)
        assert torch.equal(A.view(E, 5, *A.shape[1:])[:, :2].flatten(0, 1), each.A)
        assert torch.equal(B.view(6, 5, E)[:, :2], each.B.view(6, 2, E)) and not B.view(6, 5, E)[:, 2:].any()
        assert not A.view(E, 5, -1)[:, 2:].any()
        assert pad(source, lambda module: 2) is source

    def test_of_what_was_cut_rounds_nothing(self, tmp_path: Path) -> None:
        each = drawn(6, 3, dtype=torch.bfloat16)
        state = cut_ranks(one(tmp_path, each), 2)
        padded = pad(state, lambda module: 4)
        assert torch.equal(made_rows(padded.adapter, "m"), made_rows(state.adapter, "m"))
        assert loss(padded) == loss(state)


class TestSettling:
    def test_keeps_the_stored_types_where_nothing_changed(self, tmp_path: Path) -> None:
        modules = {f"{a}_{b}": drawn(6, 2, dtype=(TYPES[a], TYPES[b])) for a in TYPES for b in TYPES}
        source = start(opened(tmp_path, modules))
        made = settle(source, None)
        assert made.adapter.file is source.adapter.file
        for module, each in modules.items():
            found = tensors(made.adapter, module)
            assert found["A"].dtype == each.A.dtype and found["B"].dtype == each.B.dtype
            assert torch.equal(bits(found["A"]), bits(each.A)) and torch.equal(bits(found["B"]), bits(each.B))
            assert made.log[module].how == "exact"

    @pytest.mark.parametrize("asked", [BF16, F16, F32])
    @pytest.mark.parametrize("stored", [*((t, t) for t in TYPES), ("BF16", "F32"), ("F16", "BF16"), ("F32", "BF16")])
    def test_rounds_each_number_once(self, asked: Form, stored: tuple[str, str], tmp_path: Path) -> None:
        dtypes = TYPES[stored[0]], TYPES[stored[1]]
        modules = {kind: drawn(6, 2, dtype=dtypes, alpha=0.7, **shape) for kind, shape in KINDS.items()}
        made = settle(start(opened(tmp_path, modules)), asked)
        for module, each in modules.items():
            found = tensors(made.adapter, module)
            for role, side in (("A", each.A), ("B", each.B)):
                assert torch.equal(bits(found[role]), bits(side.to(TYPES[asked.name])))
                assert made.adapter.updates[module].specs[role].dtype == asked.name
            error = relative(made_rows(made.adapter, module), rows_of(each))
            assert made.log[module].loss.relative == pytest.approx(error, rel=1e-6)
            assert made.log[module].how == ("rounded" if error else "exact")

    @pytest.mark.parametrize("asked", [BF16, F16])
    def test_rounds_to_16_bits_by_way_of_float32(self, asked: Form, tmp_path: Path) -> None:
        """As torch does: of numbers next to the middle of two, which float32 holds, ties go to even."""
        each, u = drawn(6, 2, dtype=torch.float64), 2.0**-asked.precision
        middles = torch.tensor([1 + u, 1 + 3 * u, -1 - u, -1 - 3 * u, 2 - u, 4 * u], dtype=torch.float64)
        beside = middles[:, None] * torch.tensor([1 + 2.0**-40, 1 - 2.0**-40], dtype=torch.float64)
        made = settle(one(tmp_path, replace(each, B=beside)), asked)
        assert torch.equal(bits(tensors(made.adapter)["B"]), bits(beside.to(TYPES[asked.name])))

    @pytest.mark.parametrize(
        ("dtype", "scale", "kept", "how"),
        [
            ("BF16", 0.5, "BF16", "folded"),
            ("BF16", 3.0, "F32", "folded"),  # 8 bits and 2
            ("F16", 0.5, "F16", "folded"),
            ("F16", 2.0**20, "F32", "folded"),  # beyond fp16
            ("F32", 0.5, "F32", "folded"),
            ("F32", 3.0, "F32", "rounded"),
            ("F64", 3.0, "F64", "rounded"),
            ("F64", 0.5, "F64", "folded"),
        ],
    )
    @pytest.mark.parametrize("kind", ["plain", "stack"])
    def test_keeps_the_stored_type_where_it_holds_the_numbers(
        self, dtype: str, scale: float, kept: str, how: str, kind: str, tmp_path: Path
    ) -> None:
        each = drawn(6, 2, dtype=TYPES[dtype], alpha=2 * scale, **KINDS[kind])
        made = settle(fold(one(tmp_path, each)), None)
        assert {tensor.dtype for tensor in tensors(made.adapter).values()} == {TYPES[kept]}
        assert made.log["m"].how == how
        error = relative(made_rows(made.adapter, "m"), rows_of(each))
        assert error <= made.log["m"].loss.relative * (1 + 1e-6) + NOISE

    def test_of_numbers_that_a_narrower_type_holds_loses_nothing(self, tmp_path: Path) -> None:
        made = settle(one(tmp_path, small_integers(6, 2, 0, torch.float32, 2.0)), BF16)
        assert made.log["m"].how == "exact" and made.adapter.updates["m"].specs["A"].dtype == "BF16"

    @pytest.mark.parametrize(
        ("dtype", "number", "asked", "error"),
        [
            ("F32", 1e5, F16, NeedsFlag),
            ("BF16", 1e5, F16, NeedsFlag),
            ("F64", 1e39, F32, InputError),
            ("F64", 1e39, BF16, InputError),
        ],
    )
    @pytest.mark.parametrize("role", ["A", "B"])
    def test_refuses_what_overflows_by_name(
        self, dtype: str, number: float, asked: Form, error: type[LoratoolError], role: str, tmp_path: Path
    ) -> None:
        for kind, shape in KINDS.items():
            each = drawn(6, 2, dtype=TYPES[dtype], **shape)
            getattr(each, role).view(-1)[3] = number
            with pytest.raises(error, match="overflow") as caught:
                settle(one(tmp_path / kind, each), asked)
            assert caught.value.culprit == "m"

    def test_refuses_a_change_whose_squares_float64_cannot_hold(self, tmp_path: Path) -> None:
        each = drawn(6, 2, dtype=torch.float64, alpha=1.4)
        for side in (each.A, each.B):
            side.mul_(1e120)
        with pytest.raises(InputError, match="too large") as caught:
            settle(fold(one(tmp_path, each)), F64)
        assert caught.value.culprit == "m"

    @pytest.mark.parametrize("role", ["A", "B"])
    @pytest.mark.parametrize("step", STEPS)
    def test_refuses_what_is_not_finite_by_name(
        self, role: str, step: Callable[[Transformed], Transformed], tmp_path: Path
    ) -> None:
        for number in (math.nan, math.inf, -math.inf):
            each = drawn(6, 2, alpha=0.7)
            getattr(each, role)[0, 0] = number
            with pytest.raises(InputError, match="nan or inf") as caught:
                settle(step(one(tmp_path / str(number), each)), F16)
            assert f"lora_{role}" in str(caught.value.culprit)

    @pytest.mark.parametrize(("asked", "size"), [(F16, 1e-7), (BF16, 1e-39), (F32, 1e-44)])
    def test_measures_subnormals(self, asked: Form, size: float, tmp_path: Path) -> None:
        """Of few bits, or of none where a number becomes 0."""
        each = drawn(6, 2, dtype=torch.float64)
        each = replace(each, B=each.B * size)
        made = settle(one(tmp_path, each), asked)
        error = relative(made_rows(made.adapter, "m"), rows_of(each))
        assert error > 0.01 and made.log["m"].loss.relative == pytest.approx(error, rel=1e-6)
        made = settle(one(tmp_path, replace(each, B=each.B * 1e-4)), asked)
        assert not made_rows(made.adapter, "m").any() and made.log["m"].loss.relative == pytest.approx(1.0)

    @types
    @pytest.mark.parametrize("asked", [None, BF16, F32])
    def test_leaves_magnitudes(self, dtype: torch.dtype, asked: Form | None, tmp_path: Path) -> None:
        magnitude = (torch.rand(6, dtype=torch.float64) + 1).to(dtype)
        each = replace(drawn(6, 3, alpha=0.7), others={"lora_magnitude_vector": magnitude})
        state = pad(fold(one_scale(one(tmp_path, each))), lambda module: 4)
        made = settle(state, asked)
        found = tensors(made.adapter)["magnitude"]
        assert found.dtype == dtype and torch.equal(bits(found), bits(magnitude))
        assert made.adapter.updates["m"].specs["magnitude"].dtype == TYPE_NAMES[dtype]


class TestNothing:
    @pytest.mark.parametrize("step", STEPS)
    @kinds
    def test_zeros_stay_zeros_and_lose_nothing(
        self, step: Callable[[Transformed], Transformed], kind: str, tmp_path: Path
    ) -> None:
        each = drawn(6, 2, alpha=0.7, **KINDS[kind])
        made = settle(step(one(tmp_path, replace(each, B=torch.zeros_like(each.B)))), F32)
        assert not made_rows(made.adapter, "m").any()
        assert made.log["m"].loss.relative == 0 and made.log["m"].how in ("exact", "folded")

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("side", ["out", "in"])
    def test_layers_of_no_size_go_through(
        self, step: Callable[[Transformed], Transformed], side: str, tmp_path: Path
    ) -> None:
        each = drawn(6, 2, alpha=0.7)
        each = replace(each, B=each.B[:0]) if side == "out" else replace(each, A=each.A[:, :0])
        made = settle(step(one(tmp_path, each)), BF16)
        shape = (0, WIDTH) if side == "out" else (6, 0)
        assert made_rows(made.adapter, "m").shape == shape and made.log["m"].loss.relative == 0


TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
