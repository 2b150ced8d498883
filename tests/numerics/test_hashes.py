"""Hold the hashes of pairs and the sums of pages to hashlib and struct, with the compiled passes and without them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from random import Random

import pytest
from conftest import needs_passes

from loratool.numerics.passes.hashes import PAGE, page_sums, sha256_each
from loratool.numerics.passes.native import NATIVE

EITHER = pytest.mark.parametrize("native", ["0", pytest.param("1", marks=needs_passes)])


@EITHER
def test_hashes_are_those_of_hashlib(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of streams of all lengths about the ends of a block, alone, in pairs of unequal lengths and in parts."""
    monkeypatch.setenv(NATIVE, native)
    random = Random(46)
    lengths = [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 4096]
    for _ in range(200):
        texts = [random.randbytes(random.choice(lengths)) for _ in range(random.randrange(5))]
        parts = [64 * random.randrange(1, 9) for _ in texts]
        streams = [
            [memoryview(text)[start : start + part] for start in range(0, len(text), part)]
            for text, part in zip(texts, parts, strict=True)
        ]
        assert sha256_each(streams) == [hashlib.sha256(text).hexdigest() for text in texts]


@EITHER
def test_a_stream_may_overwrite_its_parts(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    texts = [bytes(range(256)) * 3, b"x" * 640]

    def parts(text: bytes) -> Iterator[memoryview]:
        buffer = bytearray(128)
        for start in range(0, len(text), 128):
            buffer[:] = text[start : start + 128]
            yield memoryview(buffer)

    assert sha256_each([parts(text) for text in texts]) == [hashlib.sha256(text).hexdigest() for text in texts]


@EITHER
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 3 * 4096 + 6])
def test_the_sums_of_pages_are_zero_of_zeros_alone(nbytes: int, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 64-bit words wrap: a page of float64's 2.0 sums up to 2**71."""
    monkeypatch.setenv(NATIVE, native)
    twos = (struct.pack("<d", 2.0) * (nbytes // 8 + 1))[:nbytes]
    for start in range(0, nbytes, PAGE):
        lost = twos[:start] + bytes(len(twos[start : start + PAGE])) + twos[start + PAGE :]
        assert (page_sums(memoryview(lost)) == page_sums(memoryview(twos))) == (lost == twos)
    words = [*struct.unpack(f"<{-(-nbytes // 4)}I", twos.ljust(-(-nbytes // 4) * 4, b"\0"))]
    sums = [sum(words[1024 * page : 1024 * (page + 1)]) for page in range(nbytes // PAGE + 1)]
    assert page_sums(memoryview(twos)) == b"".join(each.to_bytes(8, "little") for each in sums)
