"""The checksums of the dialects, each with `update` and the text that its files have.

adler32 and xxh3 find damage, but anybody can make bytes of a given sum. blake3 and sha256 stand against intent as far
as the file that has them is trusted.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from ...errors import InputError, brief
from .compression import optional_module


class Hasher(Protocol):
    """A sum of bytes that come in pieces."""

    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


class _Adler32:
    """zlib's sum of 32 bits, as 8 hexadecimal digits or as a decimal number."""

    def __init__(self, form: str) -> None:
        self._sum, self._form = 1, form

    def update(self, data: Any) -> None:
        self._sum = zlib.adler32(data, self._sum)

    def hexdigest(self) -> str:
        return format(self._sum, self._form)


def _xxh3() -> Hasher:
    hasher: Hasher = optional_module(["xxhash"], "the checksum xxh3-128").xxh3_128()
    return hasher


def _blake3() -> Hasher:
    hasher: Hasher = optional_module(["blake3"], "the checksum blake3").blake3()
    return hasher


# As the dialects spell them; Fireworks writes adler32 as a decimal number
HASHERS: dict[str, Callable[[], Hasher]] = {
    "xxh3-128": _xxh3,
    "blake3": _blake3,
    "adler32": lambda: _Adler32("08x"),
    "adler32 (decimal)": lambda: _Adler32("d"),
    "sha256": hashlib.sha256,
}


def new_hasher(algorithm: str) -> Hasher:
    return HASHERS[algorithm]()


def require_algorithm(algorithm: object, known: tuple[str, ...], culprit: str) -> str:
    """Return the name of an algorithm that a file states, one of those of its dialect."""
    if not isinstance(algorithm, str) or algorithm not in known:
        raise InputError(f"has checksums by {brief(algorithm)}, which is none of {', '.join(known)}", culprit=culprit)
    return algorithm
