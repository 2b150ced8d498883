"""Hold the compiled passes to the way without them: the same bytes, records, counts and refusals on hostile blocks."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, factors, needs_passes, run_command, spread, weights
from lib.hostile.hostile_blocks import (
    NAMES,
    DoraRows,
    HostileBlock,
    damaged,
    make_block,
    make_cast,
    merge_hostile,
    restore_hostile,
    sums_in_longdouble,
)
from lib.hostile.hostile_reals import form_of

from loratool.numerics.arrays import Numbers, bytes_of
from loratool.numerics.decide import Reals
from loratool.numerics.passes import blocks
from loratool.numerics.passes.blocks import BOUNDS, PassBounds
from loratool.numerics.passes.native import NATIVE, _is_stale, _load, describe_native, native
from loratool.numerics.products import ProductRows, Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, which users would see


@contextmanager
def passes(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NATIVE, str(int(on)))
        yield


class Takes:
    """Counts the blocks that the passes did, and those that they left, where they are on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[bool] = Counter()
        for module, name in (("numerics.merge", "merge_block"), ("undo.records", "restore_block")):
            patch.setattr(f"loratool.{module}.{name}", self._counting(getattr(blocks, name)))

    def _counting(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            result = work(*arguments, **named)
            if native() is not None:
                self.counts[result is not None] += 1
            return result

        return counted


def differences(block: HostileBlock, seed: int) -> list[str]:
    """Return what the passes do otherwise than the way without them: the names of what differs."""
    with passes(False):
        wanted, merged = merge_hostile(block)
    with passes(True):
        both = merge_hostile(block)[0], merge_hostile(block, record=False)[0]
    found = [name for name in ("merged", "payloads", "counts", "largest") if not _equal(wanted, both[0], name)]
    found += [
        f"{name} without a record" for name in ("merged", "counts", "largest") if not _equal(wanted, both[1], name)
    ]
    if block.to:
        return found
    results = merged.split(block.matrices)
    for one, result, payload, stats in zip(block.each(), results, wanted.payloads, wanted.stats, strict=True):
        if stats.overflowed:
            continue
        with passes(True):
            restored = restore_hostile(one, result, payload)
        found += [f"restored {restored[1]}"] if restored != (bytes(bytes_of(numbers_of(one.weight).bits)), "") else []
        if payload and seed % 4 == 0:
            data, refusals = damaged(np.random.default_rng(seed), payload), []
            for on in (False, True):
                with passes(on):
                    refusals.append(restore_hostile(one, result, data))
            found += [] if refusals[0] == refusals[1] else [f"refused {refusals}"]
    return found


def _equal(one: Any, other: Any, name: str) -> bool:
    return bool(getattr(one, name) == getattr(other, name))


def check(first: int, count: int, seed: int, make: Callable[[list[int]], HostileBlock] = make_block) -> None:
    for number in range(first, first + count):
        block = make([seed, number])
        assert differences(block, number) == [], f"{make.__name__}([{seed}, {number}]): {block.name}"


@needs_passes
@pytest.mark.parametrize("first", spread(range(0, 300, 50), 2))
def test_hostile_blocks(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    takes = Takes(monkeypatch)
    check(first, 50, 0)
    assert takes.counts[True] > 0.6 * takes.counts.total()


@needs_passes
def test_hostile_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = Takes(monkeypatch)
    check(0, 100, 0, make_cast)
    assert takes.counts[True] > 0.6 * takes.counts.total()


@needs_passes
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("make", [make_block, make_cast])
def test_many_hostile_blocks(make: Callable[[list[int]], HostileBlock], seed: int) -> None:
    check(0, 500, seed, make)


def of_kind(bounds: PassBounds, method: str, term: Callable[..., Any]) -> PassBounds:
    """Return the same bounds with another method."""
    kind: type[PassBounds] = type("Other", (PassBounds,), {method: term})
    return kind(**vars(bounds))


def smaller(method: str, factor: float) -> Callable[[PassBounds], PassBounds]:
    """Return what makes bounds of which a term is so many times the right one."""

    def make(bounds: PassBounds) -> PassBounds:
        def term(_: PassBounds, *arguments: Any) -> Any:
            return getattr(bounds, method)(*arguments) * factor

        return of_kind(bounds, method, term)

    return make


def of_the_least_matrix(bounds: PassBounds) -> PassBounds:
    """Return bounds in which all matrices have the norms of the columns of the least one."""

    def errors(_: PassBounds, rows: ProductRows, *of_rows: Any) -> Any:
        products = copy(rows.products)
        by_matrix = products.column_norms.reshape(products.matrices, -1)
        vars(products)["column_norms"] = np.tile(by_matrix[by_matrix.max(1).argmin()], products.matrices)
        other = copy(rows)
        other.products = products
        return bounds.errors(other, *of_rows)

    return of_kind(bounds, "errors", errors)


def without(name: str) -> Callable[[PassBounds], PassBounds]:
    return lambda bounds: replace(bounds, **{name: 0.0})


MUTANTS: dict[str, Callable[[PassBounds], PassBounds]] = {
    "E": smaller("errors", 1e-3),
    "E of the least matrix": of_the_least_matrix,
    "spread": without("spread"),
    "dot_unit": smaller("dot_unit", 0.0),
    "dot_spread": without("dot_spread"),
    "pair_unit": smaller("pair_unit", 2.0**-12),
    "pair_rounded": without("pair_rounded"),
    "margin": without("margin"),
    "f W": smaller("of_product", 0.0),
    "rho": smaller("factor_errors", 0.0),
    "room": lambda bounds: replace(bounds, room=bounds.room * 2.0**8),
    "finest": lambda bounds: replace(bounds, finest=bounds.finest * 2.0**8),
}
# fp32 is decided by pairs alone. Beside a midpoint of bf16, all sums are too; fp16 has the cast to float32
UNSEEN = {("dot_unit", FP32), ("f W", BF16), ("f W", FP16)}
UNSEEN |= {(term, dtype) for term in ("room", "finest") for dtype in (BF16, FP16)}
OF_CASTS = "E", "spread", "dot_unit", "dot_spread", "pair_unit", "pair_rounded"


@needs_passes
@pytest.mark.slow
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("make", "term"), [*((make_block, term) for term in MUTANTS), *((make_cast, term) for term in OF_CASTS)]
)
def test_a_bound_with_a_term_too_small_is_caught(
    make: Callable[[list[int]], HostileBlock], term: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (term, dtype) in UNSEEN:
        pytest.skip("no number depends on it")
    name = form_of(dtype).name
    monkeypatch.setitem(blocks.BOUNDS, name, MUTANTS[term](BOUNDS[name]))
    some = (make([9, k]) for k in range(900 if make is make_block else 2000))
    assert any(differences(block, 1) for block in some if (block.to or block.weight.dtype) == dtype)


@needs_passes
@pytest.mark.slow
def test_a_bound_without_what_underflows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way back: forwards, rows with a D that is as small are left to the way without the passes."""

    def tiny(seed: int) -> HostileBlock:
        g = torch.Generator().manual_seed(seed)
        rank, size = (1, 2, 4, 16)[seed % 4], 2.0 ** (-64 - seed % 5)
        bits = torch.randint(0, 127, (64, 512), generator=g) | torch.randint(-1, 1, (64, 512), generator=g) << 15
        A, B = (torch.randn(*shape, generator=g) * size for shape in ((rank, 512), (64, rank)))
        return HostileBlock("tiny", bits.to(torch.int16).view(torch.bfloat16), [Term(B, A, Fraction(1))])

    every = [tiny(seed) for seed in range(60)]
    assert not any(differences(block, 1) for block in every)
    monkeypatch.setitem(blocks.BOUNDS, "BF16", replace(BOUNDS["BF16"], underflow=0))
    assert any(differences(block, 1) for block in every)


@needs_passes
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize(("matrices", "is_dora"), [(1, False), (2, False), (1, True)])
def test_sums_for_the_report(matrices: int, is_dora: bool, dtype: torch.dtype) -> None:
    """To 6 digits, on weights as of models; rows in which D is 0, and inf, are among them."""
    W, (A, B) = weights(70, 5000, dtype=dtype), factors(70, 5000 * matrices, 20)
    B[::9] = 0
    W[1, 7], W[3, -1] = math.inf, -math.inf
    norms = np.full(70, 3.0)
    dora = DoraRows(torch.linspace(2.9, 3.2, 70), norms, 1.0) if is_dora else None
    block = HostileBlock("model", W, [Term(B, A, Fraction(2), by_rows=is_dora)], matrices=matrices, dora=dora)
    with passes(True):
        made, out = merge_hostile(block)
    for one, merged, stats in zip(block.each(), out.split(matrices), made.stats, strict=True):
        for name, wanted in sums_in_longdouble(one, merged).items():
            assert getattr(stats, name) == pytest.approx(wanted, rel=2e-6)
    assert made.counts[0][1] == 2 and differences(block, 0) == []


@needs_passes
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_nearly_all_weights_of_a_model_are_decided(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    takes, (A, B) = Takes(monkeypatch), factors(300, 2000, 16)
    block = HostileBlock("model", weights(300, 2000, dtype=dtype), [Term(B, A, Fraction(2))])
    with passes(True):
        made, out = merge_hostile(block)
        assert restore_hostile(block, out, made.payloads[0])[1] == ""
    assert takes.counts == {True: 2} and made.stats[0].steps["dense"] >= 600_000 - 3


@needs_passes
def test_flushed_subnormals_do_not_matter() -> None:
    torch.set_flush_denormal(True)
    try:
        check(0, 40, 5)
    finally:
        torch.set_flush_denormal(False)


@needs_passes
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 16), (7, 1), (6, 15), (13, 17), (3, 8), (2, 4095), (2, 4096), (2, 4097), (1, blocks.STRIP + 5)],
)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_shapes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    W, (A, B) = weights(*shape, dtype=dtype), factors(*shape, 5)
    assert differences(HostileBlock("shape", W, [Term(B, A, Fraction(3))]), 0) == []


@needs_passes
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_what_is_left_to_the_way_without_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, no rank, other strides, places between numbers, types or a row too long, and factors beyond range."""
    monkeypatch.setattr(blocks, "WIDEST", 100)
    work, takes = Workspace(), []
    (A, B), W, wider = (
        factors(6, 10, 2),
        numbers_of(weights(6, 10, dtype=dtype)),
        numbers_of(weights(6, 101, dtype=dtype)),
    )
    size = 60 * dtype.itemsize
    odd = Numbers(np.zeros(1 + size, np.uint8)[1:].view(W.form.bits_type).reshape(6, 10), W.form)
    cases = [
        (W, W, Term(B, A, Fraction(1))),
        (W[:0], W[:0], Term(B[:0], A, Fraction(1))),
        (W, W, Term(B[:, :0], A[:0], Fraction(1))),
        (W, W, Term(B, A, Fraction(0))),
        (Numbers(np.asfortranarray(W.bits), W.form), W, Term(B, A, Fraction(1))),
        (odd, W, Term(B, A, Fraction(1))),
        (W, Numbers.of(W.wide()), Term(B, A, Fraction(1))),
        (wider, wider, Term(B, factors(6, 101, 2)[0], Fraction(1))),
        (W, W, Term(B.double() * 2.0**70, A.double() * 2.0**70, Fraction(1))),
    ]
    for source, result, term in cases:
        x = Reals(Products([term]).rows(0, len(source)))
        takes.append(
            blocks.merge_block(x, source, 0, Numbers(result.bits.copy(), result.form), work, record=True) is not None
        )
    assert takes == [True] + [False] * 8


@needs_passes
def test_a_stale_build_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.numerics.passes.native._is_stale", lambda built: True)
    assert _load.__wrapped__() == (None, "its sources are newer: build again")


def test_a_build_that_is_older_than_its_sources_is_not_used(tmp_path: Path) -> None:
    built, source = tmp_path / "_native.abi3.so", tmp_path / "kernel.c"
    built.touch()
    assert not _is_stale(built), "a wheel has no sources"
    source.touch()
    os.utime(source, (1, 1))
    assert not _is_stale(built)
    os.utime(source, (2**31, 2**31))
    assert _is_stale(built)


def test_their_absence_can_be_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_command("--version")
    assert result.stdout.splitlines()[1] == f"native: {describe_native()}"
    monkeypatch.setattr("loratool.numerics.passes.native._load", lambda: (None, "no AVX2"))
    for value, wanted in (("0", "none (LORATOOL_NATIVE=0)"), ("", "none (no AVX2)"), ("1", "none (no AVX2)")):
        monkeypatch.setenv(NATIVE, value)
        assert run_command("--version").stdout.endswith(f"native: {wanted}\n")
    base = FIXTURES / "llama" / "base"
    for value, wanted in (("1", "LORATOOL_NATIVE=1, but the compiled passes are none (no AVX2)"), ("yes", "neither")):
        monkeypatch.setenv(NATIVE, value)
        result = run_command("inspect", base)
        assert result.exit_code == 5 and wanted in result.stderr
    monkeypatch.setenv(NATIVE, "0")
    assert run_command("inspect", base).exit_code == 0
