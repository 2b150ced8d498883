"""Hold the bodies of patches to a naive reader, every bit pattern, and damage; with the passes and without."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import needs_passes, slow
from lib.oracles import naive_patch_bodies as naive

from loratool.numerics.forms import FORMS
from loratool.numerics.passes.native import NATIVE
from loratool.patches.bodies.body import Body
from loratool.patches.bodies.table import BODIES, choose

EITHER = pytest.mark.parametrize("native", ["0", pytest.param("1", marks=needs_passes)])
WIDTHS = {**{form.name: form.itemsize for form in FORMS.values()}, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
STEPPED = ("classes", "planes", "fields")
PAIRS = [(key, dtype) for key, body in BODIES.items() for dtype in WIDTHS if body.takes(dtype)]
TYPICAL = [("classes", "BF16"), ("fields", "F16"), ("planes", "F32"), ("codes", "I32")]
each_pair = pytest.mark.parametrize(("key", "dtype"), PAIRS)

Array = Any  # of unsigned integers


def weights(dtype: str, n: int, seed: int) -> Array:
    """Return patterns of numbers of many sizes, some of them anything."""
    g, width = np.random.default_rng([seed, n]), WIDTHS[dtype]
    unsigned = np.dtype(f"<u{width}")
    anything = np.frombuffer(g.bytes(n * width), unsigned).copy()
    if dtype not in FORMS:
        return anything
    form = FORMS[dtype]
    middle = form.inf // 2
    near = np.clip(middle + g.normal(0, 1.5, n) * 2 ** (form.precision - 1), 0, form.size).astype(unsigned)
    near |= (g.random(n) < 0.5).astype(unsigned) << unsigned.type(8 * width - 1)
    return np.where(g.random(n) < 0.003, anything, near)


def changed(base: Array, share: float, most: int, seed: int) -> Array:
    """Return patterns of which a share is moved by at most so many."""
    g = np.random.default_rng([seed, base.size, 1])
    moves = g.integers(-most, most + 1, base.size).astype(np.int64).astype(base.dtype)
    return np.where(g.random(base.size) < share, base + moves, base)


def pairs_of(dtype: str, sizes: tuple[int, ...]) -> Iterator[tuple[Array, Array]]:
    for n in sizes:
        base = weights(dtype, n, 0)
        yield base, base.copy()
        for share, most in ((0.002, 1), (0.05, 1), (0.3, 3), (1.0, 40), (1.0, 120)):
            yield base, changed(base, share, most, n)
        yield base, weights(dtype, n, 1)
        yield base, np.invert(base)
        yield base[::-1].copy(), np.zeros_like(base)


def check(body: Body, base: Array, target: Array, dtype: str) -> tuple[bytes, bytes | None]:
    data, out = body.encode(base, target, dtype), np.empty_like(target)
    body.decode(base, data, dtype, out)
    assert (out == target).all()
    back = body.back(base, target, dtype)
    if back is not None:
        body.undo(target, data, back, dtype, out)
        assert (out == base).all()
    return data, back


def check_damaged(seed: int) -> None:
    """Try all bodies on spans and on damage of their data, for a sanitizer to watch."""
    for key, dtype in PAIRS:
        for base, target in pairs_of(dtype, (seed, 97 * seed)):
            data, back = check(BODIES[key], base, base if key == "same" else target, dtype)
            for damaged in [*damages(data)][seed % 5 :: 5]:
                fails(BODIES[key].decode, base, damaged, dtype, np.empty_like(target))
            for damaged in [*damages(back or b"")][seed % 5 :: 5]:
                fails(BODIES[key].undo, target, data, damaged, dtype, np.empty_like(target))


@EITHER
@each_pair
def test_a_naive_reader_has_the_same_numbers(
    key: str, dtype: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of spans that are empty, of one number, and not a multiple of the lanes; nothing changed, and everything."""
    monkeypatch.setenv(NATIVE, native)
    for base, target in pairs_of(dtype, (0, 1, 7, 150) if key != "same" else (5,)):
        if key == "same":
            target = base
        data, back = check(BODIES[key], base, target, dtype)
        assert naive.read(key, base.tolist(), data, dtype, WIDTHS[dtype]) == target.tolist()
        if key in STEPPED:
            assert back is not None
            assert naive.read_back(key, target.tolist(), data, back, dtype) == base.tolist()


@EITHER
@pytest.mark.parametrize("key", ["fields", "classes"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits_comes_back(key: str, dtype: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    every, g = np.arange(1 << 16, dtype=np.uint16), np.random.default_rng(49)
    for other in (g.permutation(every), every + np.uint16(1), np.full_like(every, 0x8000)):
        check(BODIES[key], every, other, dtype)
        check(BODIES[key], other, every, dtype)


@EITHER
@pytest.mark.parametrize("key", ["fields", "classes"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_every_pair_of_numbers_of_8_bits_comes_back(
    key: str, dtype: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NATIVE, native)
    pairs = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    check(BODIES[key], pairs[:, 0].copy(), pairs[:, 1].copy(), dtype)


@EITHER
@pytest.mark.parametrize("key", ["fields", "planes"])
def test_zeros_and_nans_of_32_bits_come_back(key: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    ends = [
        0,
        1 << 31,
        1,
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0x7FC00000,
        0xFFC01234,
        0xFFFFFFFF,
        0x7FFFFFFF,
        0x3F800000,
    ]
    base, target = (each.reshape(-1).astype(np.uint32) for each in np.meshgrid(ends, ends))
    check(BODIES[key], base, target, "F32")
    check(BODIES[key], np.tile(base, 300), np.repeat(target, 300), "F32")


@needs_passes
@pytest.mark.parametrize("most", [3000, slow(3_000_000)])
def test_the_passes_make_the_same_bytes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, (key, dtype) in enumerate(PAIRS):
        if key == "same":
            continue
        for base, target in pairs_of(dtype, (most + 37 * i,)):
            found = []
            for native in ("0", "1"):
                monkeypatch.setenv(NATIVE, native)
                found.append(check(BODIES[key], base, target, dtype))
            assert found[0] == found[1]


@needs_passes
@pytest.mark.parametrize(
    ("key", "dtype"), [("classes", "BF16"), ("fields", "F16"), ("planes", "F32"), ("codes", "I32")]
)
def test_a_naive_reader_has_the_same_numbers_of_several_lanes(key: str, dtype: str) -> None:
    for base, target in [*pairs_of(dtype, (9001,))][2:5]:
        data, back = check(BODIES[key], base, target, dtype)
        assert naive.read(key, base.tolist(), data, dtype, WIDTHS[dtype]) == target.tolist()
        if key in STEPPED:
            assert back is not None
            assert naive.read_back(key, target.tolist(), data, back, dtype) == base.tolist()


@EITHER
@pytest.mark.parametrize(("key", "dtype"), [pair if pair in TYPICAL else slow(*pair) for pair in PAIRS])
def test_damage_is_a_value_error_or_other_numbers(
    key: str, dtype: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never takes more memory than the tables and some times the span."""
    monkeypatch.setenv(NATIVE, native)
    base = weights(dtype, 250, 0)
    out = np.empty_like(base)
    for share, most in (0.01, 1), (0.3, 3), (1.0, 100):
        target = base if key == "same" else changed(base, share, most, 1)
        data, back = check(BODIES[key], base, target, dtype)
        tracemalloc.start()
        for damaged in damages(data):
            fails(BODIES[key].decode, base, damaged, dtype, out)
        for damaged in damages(back or b""):
            fails(BODIES[key].undo, target, data, damaged, dtype, out)
        for damaged in list(damages(data))[::7]:
            fails(BODIES[key].undo, target, damaged, back or b"", dtype, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * base.nbytes + (3 << 20)
        for cut in range(0, len(data), 1 + len(data) // 40):
            assert fails(BODIES[key].decode, base, data[:cut], dtype, out)
        assert fails(BODIES[key].decode, base, data + b"\0", dtype, out)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_forged_heads_take_some_times_the_span_at_most(dtype: str) -> None:
    """All numbers escaped, all listed, and counts beyond the span: data of a few bytes."""
    n = 1 << 20
    base = np.zeros(n, f"<u{WIDTHS[dtype]}")
    out, all_255, full = np.empty_like(base), b"\1\xff", n.to_bytes(4, "little")
    coded = b"\2" + b"\xff\xff" * 40
    forged: list[tuple[str, bytes]] = [
        ("classes", b"\0" + 8 * all_255),
        ("classes", b"\xff" * 99),
        ("classes", b"\0" + coded),
        ("fields", b"\1" + full + 3 * b"\1\0" + 2 * all_255),
        ("fields", b"\1" + b"\xff" * 99),
        ("fields", b"\2" + 8 * all_255),
        ("fields", b"\0" + coded),
        ("fields", b"\1" + full + 8 * all_255),
        ("bytes", coded),
        ("bytes", all_255),
        ("bytes", b"\0" * 99),
    ]
    for key, data in forged:
        tracemalloc.start()
        fails(BODIES[key].decode, base, data, dtype, out)
        fails(BODIES[key].undo, base, data, b"\xff\xff" + full + data, dtype, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 24 * n


def damages(data: bytes) -> Iterator[bytes]:
    """Yield data with a byte changed, all of the first ones and some others, cut, longer, and of other lengths."""
    for at in [*range(min(len(data), 30)), *range(30, len(data), 1 + len(data) // 30)]:
        yield data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        yield data[:at] + b"\xff" * 4 + data[at + 4 :]
        yield data[:at]
        yield data[at:]
    yield from (data + b"\0", data + data, b"\xff" * 64, bytes(64))


def fails(function: Any, *given: Any) -> bool:
    try:
        function(*given)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("dtype", WIDTHS)
def test_the_body_that_is_chosen_is_the_least(dtype: str) -> None:
    """Of a span as large as eight samples, within what tables and states are."""
    n = 1 << 19
    base = weights(dtype, n, 0)
    targets = [changed(base, *change, 0) for change in ((0.03, 1), (0.3, 2), (1.0, 30))] + [weights(dtype, n, 1)]
    for target in targets:
        sample = [np.concatenate([x[i : i + 4096] for i in range(0, n, n // 16)]) for x in (base, target)]
        sizes = {key: len(body.encode(base, target, dtype)) for key, body in BODIES.items() if body.takes(dtype)}
        del sizes["same"]
        key = choose(sample[0], sample[1], dtype)
        assert sizes[key] <= 1.03 * min(sizes.values()) + 2000
        assert key == choose(sample[0], sample[1], dtype)
        assert choose(sample[0], sample[1], dtype, fast=True) in ("fields" if dtype in FORMS else "codes", "bytes")


def test_unrelated_numbers_are_their_own_bytes() -> None:
    base, target = weights("BF16", 1 << 16, 0), weights("BF16", 1 << 16, 1)
    assert choose(base, target, "BF16") == "bytes"
    assert BODIES["bytes"].back(base, target, "BF16") is None
    with pytest.raises(ValueError, match="before"):
        BODIES["bytes"].undo(target, b"", b"", "BF16", base)


def test_the_table_names_its_bodies() -> None:
    assert all(key == body.key for key, body in BODIES.items())
    assert {dtype for _, dtype in PAIRS} == {*WIDTHS}
