"""Read ggml's blocks number by number, in fractions, as their definition in llama.cpp says, and make blocks to read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest

from loratool.files.dtypes import BLOCK_TYPES

Array = np.ndarray[Any, np.dtype[Any]]

E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]  # twice the numbers

IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(b: bytes, at: int) -> Fraction:
    return Fraction(struct.unpack_from("<e", b, at)[0])


def nibble(b: bytes, i: int, run: int, first: int = 0) -> int:
    """The number i of nibbles: of each `run` bytes, all low ones, then all high ones."""
    return b[first + i // (2 * run) * run + i % run] >> (4 * (i // run % 2)) & 15


def crumb(b: bytes, i: int, first: int = 0) -> int:
    """The number i of two bits each, 32 bytes at a time."""
    return b[first + i // 128 * 32 + i % 32] >> (2 * (i // 32 % 4)) & 3


def bit(b: bytes, i: int, first: int) -> int:
    """The bit i // 32 of byte i % 32."""
    return b[first + i % 32] >> (i // 32) & 1


def q4_k(b: bytes, i: int) -> tuple[Fraction, Fraction]:
    """The scale and the least number of Q4_K and Q5_K."""
    j, s = i // 32, b[4:16]
    if j < 4:
        scale, least = s[j] & 63, s[j + 4] & 63
    else:
        scale, least = s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4
    return half(b, 0) * scale, half(b, 2) * least


def q3_k(b: bytes, i: int) -> int:
    j, s = i // 16, b[96:108]
    return (s[j % 8] >> (4 * (j // 8)) & 15 | (s[8 + j % 4] >> (2 * (j // 4)) & 3) << 4) - 32


def iq4_xs(b: bytes, i: int) -> int:
    j, high = i // 32, b[2] | b[3] << 8
    return (b[4 + j // 2] >> (4 * (j % 2)) & 15 | (high >> (2 * j) & 3) << 4) - 32


def ue4m3(x: int) -> Fraction:
    exponent, fraction = x >> 3 & 15, x & 7
    if x == 0x7F:
        return Fraction(0)
    return Fraction(fraction, 512) if not exponent else (8 + fraction) * Fraction(2) ** (exponent - 10)


def tq1_0(b: bytes, i: int) -> int:
    if i < 160:
        digit, byte = divmod(i, 32)
    elif i < 240:
        digit, byte = (i - 160) // 16, 32 + i % 16
    else:
        digit, byte = (i - 240) // 4, 48 + i % 4
    return (b[byte] * 3**digit % 256 * 3 >> 8) - 1


def q6_k(b: bytes, i: int) -> int:
    return nibble(b, i, 64) | crumb(b, i, 128) << 4


@cache
def grid(kind: str) -> list[list[int]]:
    """gguf-py's list of runs of a type, from llama.cpp's."""
    listed = getattr(pytest.importorskip("gguf").quants, kind)
    listed.init_grid()
    found: list[list[int]] = listed.grid.reshape(listed.grid_shape).astype(int).tolist()
    return found


def word(b: bytes, at: int, size: int) -> int:
    return int.from_bytes(b[at : at + size], "little")


def parity_sign(seven: int, i: int) -> int:
    """The sign i of 8, of which the last makes the number of negative ones even."""
    eight = seven | seven.bit_count() % 2 << 7
    return -1 if eight >> i & 1 else 1


def iq2_xxs(b: bytes, i: int) -> Fraction:
    at, run = 2 + i // 32 * 8, i % 32 // 8
    signs = word(b, at + 4, 4)
    scale = half(b, 0) * (Fraction(1, 2) + (signs >> 28)) / 4
    return scale * grid("IQ2_XXS")[b[at + run]][i % 8] * parity_sign(signs >> 7 * run & 127, i % 8)


def iq2_xs(b: bytes, i: int) -> Fraction:
    both = word(b, 2 + i // 8 * 2, 2)
    scale = half(b, 0) * (Fraction(1, 2) + (b[66 + i // 32] >> 4 * (i // 16 % 2) & 15)) / 4
    return scale * grid("IQ2_XS")[both & 511][i % 8] * parity_sign(both >> 9, i % 8)


def iq2_s(b: bytes, i: int) -> Fraction:
    run = i // 8
    index = b[2 + run] | (b[66 + run // 4] >> 2 * (run % 4) & 3) << 8
    scale = half(b, 0) * (Fraction(1, 2) + (b[74 + i // 32] >> 4 * (i // 16 % 2) & 15)) / 4
    return scale * grid("IQ2_S")[index][i % 8] * (-1 if b[34 + run] >> i % 8 & 1 else 1)


def iq3_xxs(b: bytes, i: int) -> Fraction:
    signs = word(b, 66 + i // 32 * 4, 4)
    scale = half(b, 0) * (Fraction(1, 2) + (signs >> 28)) / 2
    return scale * grid("IQ3_XXS")[b[2 + i // 4]][i % 4] * parity_sign(signs >> 7 * (i % 32 // 8) & 127, i % 8)


def iq3_s(b: bytes, i: int) -> Fraction:
    run = i // 4
    index = b[2 + run] | (b[66 + run // 8] >> run % 8 & 1) << 8
    scale = half(b, 0) * (1 + 2 * (b[106 + i // 64] >> 4 * (i // 32 % 2) & 15))
    return scale * grid("IQ3_S")[index][i % 4] * (-1 if b[74 + i // 8] >> i % 8 & 1 else 1)


def iq1_s(b: bytes, i: int) -> Fraction:
    run, high = i // 8, word(b, 34 + i // 32 * 2, 2)
    number = grid("IQ1_S")[b[2 + run] | (high >> 3 * (run % 4) & 7) << 8][i % 8]
    return half(b, 0) * (2 * (high >> 12 & 7) + 1) * (number + Fraction(-1 if high >> 15 else 1, 8))


def iq1_m(b: bytes, i: int) -> Fraction:
    run, words = i // 8, [word(b, 48 + 2 * k, 2) for k in range(4)]
    high = b[32 + run // 2] >> 4 * (run % 2) & 15
    number = grid("IQ1_S")[b[run] | (high & 7) << 8][i % 8]
    d = half(sum((w >> 12) << 4 * k for k, w in enumerate(words)).to_bytes(2, "little"), 0)
    scale = d * (2 * (words[i // 64] >> 3 * (i // 16 % 4) & 7) + 1)
    return scale * (number + Fraction(-1 if high & 8 else 1, 8))


# The number i of a block
NUMBERS: dict[str, Callable[[bytes, int], Fraction]] = {
    "Q8_0": lambda b, i: half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0],
    "Q4_0": lambda b, i: half(b, 0) * (nibble(b, i, 16, 2) - 8),
    "Q4_1": lambda b, i: half(b, 0) * nibble(b, i, 16, 4) + half(b, 2),
    "Q5_0": lambda b, i: half(b, 0) * ((nibble(b, i, 16, 6) | (b[2 + i // 8] >> i % 8 & 1) << 4) - 16),
    "Q5_1": lambda b, i: half(b, 0) * (nibble(b, i, 16, 8) | (b[4 + i // 8] >> i % 8 & 1) << 4) + half(b, 2),
    "Q2_K": lambda b, i: half(b, 80) * (b[i // 16] & 15) * crumb(b, i, 16) - half(b, 82) * (b[i // 16] >> 4),
    "Q3_K": lambda b, i: half(b, 108) * q3_k(b, i) * (crumb(b, i, 32) - 4 * (1 - bit(b, i, 0))),
    "Q4_K": lambda b, i: q4_k(b, i)[0] * nibble(b, i, 32, 16) - q4_k(b, i)[1],
    "Q5_K": lambda b, i: q4_k(b, i)[0] * (nibble(b, i, 32, 48) | bit(b, i, 16) << 4) - q4_k(b, i)[1],
    "Q6_K": lambda b, i: half(b, 208) * struct.unpack_from("<b", b, 192 + i // 16)[0] * (q6_k(b, i) - 32),
    "IQ4_NL": lambda b, i: half(b, 0) * IQ4[nibble(b, i, 16, 2)],
    "IQ4_XS": lambda b, i: half(b, 0) * iq4_xs(b, i) * IQ4[nibble(b, i, 16, 8)],
    "MXFP4": lambda b, i: Fraction(2) ** (b[0] - 128) * E2M1[nibble(b, i, 16, 1)],
    "NVFP4": lambda b, i: ue4m3(b[i // 16]) / 2 * E2M1[nibble(b, i, 8, 4)],
    "TQ1_0": lambda b, i: half(b, 52) * tq1_0(b, i),
    "TQ2_0": lambda b, i: half(b, 64) * (crumb(b, i) - 1),
    "Q1_0": lambda b, i: half(b, 0) * (2 * (b[2 + i // 8] >> i % 8 & 1) - 1),
    "Q2_0": lambda b, i: half(b, 0) * ((b[2 + i // 4] >> 2 * (i % 4) & 3) - 1),
    "IQ1_S": iq1_s, "IQ1_M": iq1_m, "IQ2_XXS": iq2_xxs, "IQ2_XS": iq2_xs, "IQ2_S": iq2_s, "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
}  # fmt: skip

# Where blocks have float16 scales
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "NVFP4": [],
    "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0],
    "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0],
}  # fmt: skip

KINDS = list(NUMBERS)

IN_RUNS = [kind for kind in KINDS if kind.startswith(("IQ1", "IQ2", "IQ3"))]  # whose numbers share codes


def blocks_of(kind: str, count: int, seed: int = 0, usual: bool = True) -> Array:
    """Random blocks, (count, bytes); `usual`: as writers make them, with scales near 1, not any float16."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (count, BLOCK_TYPES[kind][1]), dtype=np.uint8)
    for at in HALVES[kind] if usual else ():
        blocks[:, at : at + 2] = draw.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    if kind == "TQ1_0" and usual:  # what writers write: a fraction of 243, rounded up
        for first, last, step in ((0, 48, 1), (48, 52, 3)):
            digits = draw.integers(0, 243 // step, (count, last - first)) * step
            blocks[:, first:last] = -(-digits * 256 // 243)
    if kind == "IQ1_M" and usual:  # a float16 in four nibbles
        scales = draw.normal(size=count).astype("<f2").view("<u2")
        for k in range(4):
            blocks[:, 49 + 2 * k] = blocks[:, 49 + 2 * k] & 15 | (scales >> 4 * k & 15).astype(np.uint8) << 4
    if kind == "TQ2_0" and usual:  # writers write no code 3
        both = blocks[:, :64] & (blocks[:, :64] >> 1) & 0b01010101
        blocks[:, :64] &= ~(both * 3)
    return blocks
