"""Damage bytes and JSON texts: the mutators that fuzzers of several formats share."""

from __future__ import annotations

import random
from collections.abc import Iterable

# JSON values in the place of any other, as texts: the last of them, and some before, are no JSON
VALUES = (
    *"0 1 -1 2 7 8 15 16 31 64 4096 -0 1.0 0.5 1e2 1e999 -1e999 1e-999 NaN Infinity -Infinity 4294967295".split(),
    *"4294967296 9223372036854775807 9223372036854775808 18446744073709551615 18446744073709551616 007 0x10".split(),
    *"99999999999999999999999 null true false [] [0] [[]] {} 1_000 +1 .5 1.".split(),
    *('""', '"F32"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\u001b[31m"', '"a.weight"', '{"a":1}', '["a"]'),
    *("1" * 5000, "[" * 50 + "]" * 50, "[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 100_000),
)

PIECES = (*(bytes([each]) for each in b'\xff\0{}[],"\\ 1'), b"\xe2\x80\xae", b"\xed\xa0\x80", b"\x1b[31m")
BEFORE = (b"\xef\xbb\xbf", b" ", b"\n\t", b"\0", b"\xff\xfe", b"[", b"//")
BEHIND = (b" ", b"\0", b"   \n", b"}", b"{}", b"x", b" " * 5000)


def as_object(items: Iterable[tuple[str, str]]) -> str:
    """Return a JSON object of names, which may repeat, and values that are JSON texts already."""
    return "{" + ",".join(f'"{name}":{value}' for name, value in items) + "}"


def damaged_bytes(rng: random.Random, valid: bytes) -> bytes:
    """Return bytes with some changed, taken away, doubled or put between, at their begin, within or at their end."""
    made = bytearray(valid)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(made)) if made else 0
        match rng.randrange(7):
            case 0 if made:
                made[at] = rng.randrange(256)
            case 1 if made:
                made[at] ^= 1 << rng.randrange(8)
            case 2:
                del made[at : at + rng.choice((1, 2, 20))]
            case 3:
                made[at:at] = rng.choice(PIECES)
            case 4:
                other = rng.randrange(len(made) + 1)
                made[at:at] = made[other : other + rng.choice((1, 8, 30))]
            case 5:
                made[:0] = rng.choice(BEFORE)
            case 6:
                made += rng.choice(BEHIND)
    return bytes(made)
