"""Hash several streams of bytes, two in one loop where the processor has the instructions, and sum pages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

from .native import native

PAGE = 4096  # bytes

_BLOCK = 64  # bytes that sha256 takes at a time
# the first 32 bits of the fractions of the square roots of 2, 3, 5, ..., 19 (FIPS 180-4, 5.3.3)
_INITIAL = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)


def sha256_each(streams: Sequence[Iterable[memoryview]]) -> list[str]:
    """Return the sha256 of each stream of bytes, in hexadecimal.

    Args:
        streams: each yields its bytes in parts; the next one may overwrite it. All but the last have a multiple of 64
            bytes.
    """
    module, found = native(), list[str]()
    for start in range(0, len(streams), 2):
        pair = streams[start : start + 2]
        if module is not None and module.HAS_SHA and len(pair) == 2:
            found += _hash_two(module, *pair)
        else:
            found += map(_hash_one, pair)
    return found


def page_sums(data: memoryview) -> bytes:
    """Return the sum of each PAGE of bytes as little-endian 32-bit words, padded with zeros, 8 bytes each.

    A hash of the sums detects pages that a crash lost: no sum wraps, so only a page of zeros has the sum 0.
    """
    pages = len(data) // PAGE
    sums, module = np.empty(pages + 1, "<u8"), native()
    whole = np.frombuffer(data[: pages * PAGE], np.uint8)
    if module is None:
        whole.view("<u4").reshape(-1, PAGE // 4).sum(1, dtype="<u8", out=sums[:pages])
    else:
        module.sum_pages(whole.ctypes.data, pages, sums.ctypes.data)
    sums[pages] = np.frombuffer(bytes(data[pages * PAGE :]).ljust(PAGE, b"\0"), "<u4").sum(dtype="<u8")
    return sums.tobytes()


def _hash_one(stream: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in stream:
        digest.update(part)
    return digest.hexdigest()


def _hash_two(module: ModuleType, *streams: Iterable[memoryview]) -> list[str]:
    states = np.array([_INITIAL] * 2, np.uint32)
    blocks = [_blocks(stream) for stream in streams]
    first, second = (next(each) for each in blocks)
    while len(first) and len(second):
        size = min(len(first), len(second))
        module.hash_blocks(_address(states), _address(first), _address(second), size // _BLOCK)
        first, second = (
            part[size:] if len(part) > size else next(each, _NONE)
            for part, each in zip((first, second), blocks, strict=True)
        )
    for state, part, each in zip(states, (first, second), blocks, strict=True):
        while len(part):
            module.hash_blocks(_address(state), _address(part), 0, len(part) // _BLOCK)
            part = next(each, _NONE)
    return [state.astype(">u4").tobytes().hex() for state in states]


_NONE = np.zeros(0, np.uint8)


def _blocks(stream: Iterable[memoryview]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield a stream's bytes in whole blocks, with the padding of sha256 at the end."""
    length, rest = 0, b""
    for part in stream:
        assert not rest
        length, whole = length + len(part), len(part) // _BLOCK * _BLOCK
        if whole:
            yield np.frombuffer(part[:whole], np.uint8)
        rest = bytes(part[whole:])
    zeros = bytes(-(len(rest) + 9) % _BLOCK)
    yield np.frombuffer(rest + b"\x80" + zeros + (8 * length).to_bytes(8, "big"), np.uint8)


def _address(x: npt.NDArray[np.generic]) -> int:
    return int(x.ctypes.data)
