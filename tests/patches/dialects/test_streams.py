"""Hold the streams against loops over whole bytes, however they are cut, and give decompressors what is no frame."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from dialect_models import cut
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import InputError
from loratool.patches.dialects.compression import compressed, decompressed
from loratool.patches.dialects.streams import Block, ByteStream, differing_numbers, paired, scattered, xored

SIZES = st.integers(1, 40)


def joined(pieces: Iterator[memoryview]) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


@given(st.binary(max_size=99), SIZES, SIZES)
def test_exclusive_or(data: bytes, one: int, two: int) -> None:
    other = data[::-1]
    found = joined(xored(cut(data, one), cut(other, two), "x"))
    assert found == bytes(a ^ b for a, b in zip(data, other, strict=True))
    if data:
        for sides in ((data, other[1:]), (data[1:], other)):
            with pytest.raises(InputError, match="another length"):
                list(paired(cut(sides[0], one), cut(sides[1], two), "x"))


@given(st.lists(st.booleans(), max_size=60), st.sampled_from([1, 2, 4, 8]), SIZES, SIZES, SIZES)
def test_numbers_at_positions(changed: list[bool], width: int, one: int, two: int, step: int) -> None:
    base = bytes(i % 251 for i in range(len(changed) * width))
    target = bytes(b ^ changed[i // width] for i, b in enumerate(base))
    blocks = [*differing_numbers(cut(base, one), cut(target, two), width, "x")]
    places = [int(place) for block in blocks for place in block[0]]
    assert places == [i for i, each in enumerate(changed) if each]
    numbers = np.concatenate([np.empty((0, width), np.uint8), *(block[1] for block in blocks)])

    def again() -> Iterator[Block]:
        for first in range(0, len(places), step):
            yield np.array(places[first : first + step], np.int64), numbers[first : first + step]

    assert joined(scattered(cut(base, one), again(), len(base), width, "x")) == target
    if places:
        with pytest.raises(InputError, match="beyond the end"):
            list(scattered(cut(base[: places[-1] * width], one), again(), len(base), width, "x"))


@given(st.binary(max_size=3000), SIZES, st.booleans(), st.booleans())
def test_frames(data: bytes, size: int, is_zlib: bool, has_size: bool) -> None:
    press = zstandard.ZstdCompressor(level=3, write_content_size=has_size)
    frame = zlib.compress(data) if is_zlib else press.compress(data)
    assert b"".join(decompressed(cut(frame, size), len(data), "x")) == data
    for wrong in (len(data) + 1, len(data) - 1):
        if wrong >= 0:
            with pytest.raises(InputError):
                list(decompressed(cut(frame, size), wrong, "x"))
    for forged in (frame + b"1", frame + frame, frame[:-1]):
        with pytest.raises(InputError):
            list(decompressed(cut(forged, size), len(data), "x"))


@given(st.binary(max_size=3000), SIZES)
def test_our_frames(data: bytes, size: int) -> None:
    frame = b"".join(compressed(cut(data, size), len(data)))
    assert zstandard.frame_content_size(frame) == len(data)
    assert zstandard.ZstdDecompressor().decompress(frame) == data


def test_what_is_no_frame() -> None:
    book = zstandard.ZstdCompressionDict(b"a dictionary of words" * 20)
    with_book = zstandard.ZstdCompressor(level=1, dict_data=book).compress(b"words" * 50)
    named = bytearray(b"\x28\xb5\x2f\xfd\x21") + b"\x07" + struct.pack("<B", 250) + with_book[6:]  # a dictionary's id
    window = b"\x28\xb5\x2f\xfd\x00\xff" + b"\x01\x00\x00"  # of 2**41 * 15 / 8 bytes
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"1234"
    bomb = zlib.compress(bytes(1 << 24))
    for data in (bytes(named), window, skippable, bomb, b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\xff"):
        with pytest.raises(InputError):
            list(decompressed(cut(data, 5), 250, "x"))


def test_a_stream_of_exact_counts() -> None:
    stream = ByteStream(iter([b"abc", b"", b"defg"]), "x")
    assert stream.take(2) == b"ab" and stream.take(3) == b"cde"
    stream.skip(1)
    with pytest.raises(InputError, match="is followed by other bytes"):
        stream.finish()
    with pytest.raises(InputError, match="ends 2 bytes too early"):
        ByteStream(iter([b"abc"]), "x").take(5)
