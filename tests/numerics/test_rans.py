"""Hold the entropy coder to one that was written from its docstring in Python's integers, passes or not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from conftest import needs_passes, slow
from lib.oracles import naive_patch_bodies as naive

from loratool.numerics import rans
from loratool.numerics.passes.native import NATIVE
from loratool.numerics.rans import Bytes, Table

EITHER = pytest.mark.parametrize("native", ["0", pytest.param("1", marks=needs_passes)])
SIZES = (0, 1, 2, 3, 255, 8191, 8192, 8193, 20_000)


def hostile(n: int, seed: int) -> tuple[Bytes, Bytes | None, int]:
    """Return symbols, their classes and how many classes there are: of any skew, one symbol, all equally often."""
    g = np.random.default_rng([seed, n])
    rows = int(g.integers(1, 17))
    classes = g.integers(0, int(g.integers(1, rows + 1)), n).astype(np.uint8) if seed % 3 else None
    rows = rows if classes is not None else 1
    shape = g.choice([0.01, 0.3, 1, 20, 300])
    symbols = np.minimum(g.geometric(min(1, 1 / (shape + 0.5)), n) - 1, 255).astype(np.uint8)
    if seed % 5 == 0:
        symbols = g.integers(0, 256, n).astype(np.uint8)
    if seed % 7 == 0:
        symbols[:] = 7
    if seed % 4 == 0 and classes is not None:  # what the classes say nearly alone
        symbols = np.where(g.random(n) < 0.001, symbols, classes).astype(np.uint8)
    return symbols, classes, rows


def table_of(symbols: Bytes, classes: Bytes | None, rows: int) -> Table:
    return rans.frequencies(rans.count(symbols, classes, rows))


@EITHER
@pytest.mark.parametrize("n", SIZES)
def test_codes_are_those_of_a_naive_coder(n: int, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    for seed in range(2 if n > 8000 else 10):
        symbols, classes, rows = hostile(n, seed)
        table = table_of(symbols, classes, rows)
        code = rans.encode_symbols(symbols, classes, table)
        known = [0] * n if classes is None else classes.tolist()
        assert code == naive.encode(symbols.tolist(), known, table.tolist())
        assert naive.decode(code, n, known, table.tolist()) == symbols.tolist()
        assert (rans.decode_symbols(code, n, classes, table) == symbols).all()


@needs_passes
@pytest.mark.parametrize("most", [1 << 18, slow(1 << 22)])
def test_the_passes_make_the_same_bytes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(12):
        symbols, classes, rows = hostile(most * (seed + 1) // 12 - seed, seed)
        marks = np.random.default_rng(seed).random((rows, 256)) < 0.1
        marks[:, 255] = True
        found: list[list[Any]] = []
        for native in ("0", "1"):
            monkeypatch.setenv(NATIVE, native)
            table = table_of(symbols, classes, rows)
            code = rans.encode_symbols(symbols, classes, table)
            assert (rans.decode_symbols(code, symbols.size, classes, table) == symbols).all()
            changed = symbols.copy()
            positions = rans.mark(changed, classes, marks)
            assert (np.flatnonzero(changed == 255) == positions).all()
            found.append([table.tobytes(), code, changed.tobytes(), positions.tobytes()])
        assert found[0] == found[1]


def test_frequencies_sum_and_are_near_the_shares() -> None:
    for seed in range(50):
        symbols, classes, rows = hostile(5000, seed)
        counts = rans.count(symbols, classes, rows)
        known = np.zeros(symbols.size, np.int64) if classes is None else classes.astype(np.int64)
        assert (counts == np.histogram2d(known, symbols, [np.arange(rows + 1), np.arange(257)])[0]).all()
        table = rans.frequencies(counts)
        assert ((table > 0) == (counts > 0)).all()
        assert {*table.sum(1).tolist()} <= {0, 4096}
        for row, shares in zip(table, counts, strict=True):
            if shares.any():
                exact = shares / shares.sum() * 4096
                others = np.arange(256) != shares.argmax()
                small = others & (exact < 2048 / 256)  # the largest gives what the least ones are raised by
                assert (abs(row - exact)[small] <= 1).all()
    huge = np.zeros((1, 256), np.int64)
    huge[0, :2] = 1 << 24, 1
    assert rans.frequencies(huge)[0, :3].tolist() == [4095, 1, 0]


def test_costs_are_the_logarithms() -> None:
    table, counts = np.zeros((16, 256), np.uint32), np.zeros((16, 256), np.int64)
    for f in range(1, 4097):
        table[f % 16, f // 16 % 256], counts[f % 16, f // 16 % 256] = f, 1
        assert abs(rans.cost(counts * 1000, table) - 1000 * math.log2(4096 / f)) <= 1.1
        counts[f % 16, f // 16 % 256] = 0


def test_a_code_is_as_long_as_its_cost() -> None:
    for seed in range(20):
        symbols, classes, rows = hostile(100_000, seed)
        counts = rans.count(symbols, classes, rows)
        table = rans.frequencies(counts)
        code = rans.encode_symbols(symbols, classes, table)
        cost = rans.cost(counts, table) / 8
        assert cost <= len(code) <= 1.002 * cost + 4 * rans.lanes(symbols.size)


def test_lanes_are_few() -> None:
    assert [rans.lanes(n) for n in (0, 1, 8191, 8192, 1 << 20, 1 << 23, 1 << 24)] == [1, 1, 1, 2, 256, 2048, 4096]
    assert all(4 * rans.lanes(n) <= 0.001 * n + 4 for n in range(1, 1 << 24, 997))
    assert all(rans.lanes(n) == naive.lanes(n) for n in range(1, 1 << 24, 99_991))


@EITHER
def test_damage_is_a_value_error_or_other_symbols(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    tried = unnoticed = 0
    for seed, n in ((1, 300), (2, 9000), (5, 700), (8, 17_000)):
        symbols, classes, rows = hostile(n, seed)
        table = table_of(symbols, classes, rows)
        code = rans.encode_symbols(symbols, classes, table)

        def fails(data: bytes, n: int = n, classes: Bytes | None = classes, table: Table = table) -> bool:
            try:
                return rans.decode_symbols(data, n, classes, table).size != n
            except ValueError:
                return True

        assert not fails(code)
        assert all(fails(code[:cut]) for cut in range(0, len(code), 1 + len(code) // 60))
        assert all(fails(code + more) for more in (b"\0", b"\0\0", b"\xff" * 4))
        for at in range(0, len(code), 1 + len(code) // 60):
            flipped = bytearray(code)
            flipped[at] ^= 1 << at % 8
            tried += 1
            unnoticed += not fails(bytes(flipped))
        for forged in (table + 1, table // 2, table * 0, np.vstack([table] * 17)):
            assert fails(code, table=forged.astype(np.uint32))
    assert tried > 100 and unnoticed <= 0.02 * tried


def test_more_symbols_than_a_code_has_take_no_memory() -> None:
    table = np.zeros((1, 256), np.uint32)
    table[0, 0] = 4096
    for n in (rans.MOST_SYMBOLS + 1, 1 << 40):
        with pytest.raises(ValueError, match="symbols in one code"):
            rans.decode_symbols(b"", n, None, table)
    with pytest.raises(ValueError, match="another length"):
        rans.decode_symbols(b"", rans.MOST_SYMBOLS, None, table)
