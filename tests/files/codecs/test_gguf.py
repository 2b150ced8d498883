"""Hold ggml's block types against their definition, number by number in fractions, and gguf-py and llama.cpp."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_bytes import floats, tensor, write
from llama_cpp import tree
from one_weight import codec_of, numbers, only, written

from loratool.errors import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.gguf import BITS
from loratool.files.codecs.gguf_blocks import LAYOUTS
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES

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
}

# Where blocks have float16 scales
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "NVFP4": [],
    "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0],
}  # fmt: skip

KINDS = list(NUMBERS)


def blocks_of(kind: str, count: int, seed: int = 0, usual: bool = True) -> Array:
    """Random blocks, (count, bytes); `usual`: their scales are near 1 instead of any float16, as inf."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (count, BLOCK_TYPES[kind][1]), dtype=np.uint8)
    for at in HALVES[kind] if usual else ():
        blocks[:, at : at + 2] = draw.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    if kind == "TQ1_0" and usual:  # what writers write: a fraction of 243, rounded up
        for first, last, step in ((0, 48, 1), (48, 52, 3)):
            digits = draw.integers(0, 243 // step, (count, last - first)) * step
            blocks[:, first:last] = -(-digits * 256 // 243)
    return blocks


def opened(folder: Path, kind: str, blocks: Array, shape: tuple[int, ...], **others: Any) -> Checkpoint:
    tensors = {"x.weight": tensor(GGML_TYPES[kind][0], shape, blocks.tobytes()), **others}
    return open_checkpoint(write(folder / "m.gguf", {"general.architecture": "llama"}, tensors))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_tables_are_of_the_same_types() -> None:
    assert set(KINDS) == set(BITS) == set(LAYOUTS) <= set(BLOCK_TYPES)


def test_each_number_is_that_of_the_definition(kind: str, tmp_path: Path) -> None:
    blocks = blocks_of(kind, 6)
    size = BLOCK_TYPES[kind][0]
    checkpoint = opened(tmp_path, kind, blocks, (2, 3 * size))
    found = numbers(only(checkpoint))
    expected = [[NUMBERS[kind](bytes(block), i) for i in range(size)] for block in blocks]
    assert found.tolist() == np.array(expected, float).reshape(2, 3 * size).tolist()
    assert (checkpoint["x.weight"].numpy() == found).all() and checkpoint.specs["x.weight"].dtype == "F64"


def test_rows_are_read_and_written_by_themselves(kind: str, tmp_path: Path) -> None:
    """Any blocks come back from codes and padding, and codes from their numbers."""
    size, nbytes = BLOCK_TYPES[kind]
    blocks = blocks_of(kind, 12)
    parts = only(opened(tmp_path, kind, blocks, (2, 3, 2 * size)))
    codec, whole = codec_of(parts), numbers(parts)
    codec.check(parts)
    for start, stop in ((0, 6), (2, 5), (5, 6)):
        codes = codec.codes(parts, start, stop)
        assert codes.shape == (stop - start, codec.width(parts))
        assert (codec.values(parts, start, codes) == whole[start:stop]).all()
        assert (codec.values(parts, start, codes[:, : 2 * size]) == whole[start:stop]).all()
        ((first, data),) = codec.places(parts, start, codes)
        assert (first, data) == (start * 2 * nbytes, blocks[2 * start : 2 * stop].tobytes())
        again = codec.nearest(parts, start, whole[start:stop])
        assert (codec.values(parts, start, again) == whole[start:stop]).all()


def test_scales_that_are_no_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    for at in HALVES[kind]:
        for bad in (b"\x00\x7c", b"\x00\xfc", b"\x01\x7c"):  # inf, -inf, a signaling nan
            blocks = blocks_of(kind, 4)
            blocks[3, at : at + 2] = list(bad)
            parts = only(opened(tmp_path, kind, blocks, (2, 2 * BLOCK_TYPES[kind][0])))
            with pytest.raises(InputError, match=r"x.weight: holds scales that are nan or infinite"):
                codec_of(parts).check(parts)


def test_ternary_bytes_that_no_digits_make_are_refused(tmp_path: Path) -> None:
    """They mean something, but would not come back: 13 of 256 values are no fraction of 243, rounded up."""
    blocks = blocks_of("TQ1_0", 2)
    blocks[1, 5] = 128 if blocks[1, 5] != 128 else 129
    made = {-(-digits * 256 // 243) for digits in range(243)}
    blocks[1, 5] = min(set(range(256)) - made)
    parts = only(opened(tmp_path, "TQ1_0", blocks, (2, 256)))
    with pytest.raises(InputError, match="five digits of base 3"):
        codec_of(parts).check(parts)


def test_a_scale_beside_a_weight_is_a_factor(tmp_path: Path) -> None:
    blocks = blocks_of("Q4_1", 4)
    for factors in ([3.0], [0.5, -7.0]):
        scale = floats(np.array(factors, np.float32))
        parts = only(opened(tmp_path, "Q4_1", blocks, (2, 2, 32), **{"x.scale": scale}))
        expected = [[float(NUMBERS["Q4_1"](bytes(b), i)) for i in range(32)] for b in blocks]
        found = numbers(parts)
        each = np.repeat(factors, 4 // len(factors))[:, None]
        assert np.abs(found - expected * each).max() <= 1e-12  # one rounding of float64 more
        assert (numbers(parts, 1, 4) == found[1:]).all()
        assert codec_of(parts).quantizer(parts) is None
    checkpoint = opened(tmp_path, "Q4_1", blocks, (2, 2, 32), **{"x.scale": floats(np.ones(3, np.float32))})
    assert checkpoint.faults["x.weight"] == "x.scale has 3 numbers, for 2 matrices"


@pytest.mark.parametrize("codebook", sorted(BLOCK_TYPES.keys() - BITS.keys()))
def test_types_with_codebooks_are_known_and_not_read(codebook: str, tmp_path: Path) -> None:
    size, nbytes = BLOCK_TYPES[codebook]
    checkpoint = opened(tmp_path, codebook, np.zeros((4, nbytes), np.uint8), (2, 2 * size))
    assert checkpoint.coded["x.weight"].format == f"GGUF {codebook}" and checkpoint.coded["x.weight"].size == 4 * size


def _gguf_py() -> Any:
    return pytest.importorskip("gguf", reason="needs gguf, which is in the extra `oracles`")


def test_gguf_py_reads_the_same_float32(kind: str, tmp_path: Path) -> None:
    """Of any bytes, but those of which it knows no numbers; bit for bit, -0 and infinities too."""
    quants = _gguf_py().quants
    blocks = blocks_of(kind, 400, seed=1, usual=False)
    try:
        with np.errstate(all="ignore"):
            theirs = quants.dequantize(blocks, _gguf_py().GGMLQuantizationType[kind])
    except (NotImplementedError, KeyError):
        assert kind in ("Q1_0", "Q2_0")
        return
    with np.errstate(all="ignore"):
        found = numbers(only(opened(tmp_path, kind, blocks, theirs.shape))).astype(np.float32)
    assert ((found.view(np.int32) == theirs.view(np.int32)) | (np.isnan(found) & np.isnan(theirs))).all()


FRESH = ("Q8_0", "Q4_0", "Q4_1")


def hard_rows(draw: np.random.Generator) -> Array:
    """Rows of usual numbers, of ties, of zeros, of one number, and near both ends of float16."""
    usual = draw.normal(size=(200, 64)).astype(np.float16).astype(np.float32)
    ties = draw.integers(-254, 255, (100, 64)).astype(np.float32) / 2
    ties[:, ::32] = 127
    zeros = np.where(draw.integers(0, 2, (50, 64)) > 0, np.float32(0), np.float32(-0.0))
    zeros[::2, 5] = 3
    rest = [np.zeros((2, 64)), np.full((2, 64), -3.25), np.eye(8, 64), -np.eye(8, 64)]
    return np.concatenate([usual, ties, zeros, *rest, usual[:20] * 1e4, usual[:20] * 1e-7]).astype(np.float32)


@pytest.mark.parametrize("fresh", FRESH)
def test_fresh_blocks_are_those_of_gguf_py(fresh: str, tmp_path: Path) -> None:
    quants = _gguf_py().quants
    rows = hard_rows(np.random.default_rng(2))
    parts = only(opened(tmp_path, fresh, blocks_of(fresh, 2 * len(rows)), rows.shape))
    rows += np.float32(0)  # of -0 alone, its scale for Q4_0 is not llama.cpp's
    with np.errstate(all="ignore"):
        theirs = quants.quantize(rows, _gguf_py().GGMLQuantizationType[fresh]).tobytes()
    assert written(parts, torch.from_numpy(rows)) == {"codes": theirs}
    assert written(parts, torch.from_numpy(rows), 7) == {"codes": theirs}


@pytest.mark.parametrize("fresh", FRESH)
def test_what_no_float16_scale_holds_is_refused(fresh: str, tmp_path: Path) -> None:
    parts = only(opened(tmp_path, fresh, blocks_of(fresh, 2), (2, 32)))
    with pytest.raises(InputError, match=r"x.weight: has weights too large for the float16 scales"):
        written(parts, torch.full((2, 32), 1e9))


@pytest.fixture(scope="module")
def ggml(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """llama.cpp's ggml-quants.c, compiled."""
    source, out = tree() / "ggml", tmp_path_factory.mktemp("ggml") / "quants.so"
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    flags = ["-O1", "-shared", "-fPIC", "-ffp-contract=off", f"-I{source / 'src'}", f"-I{source / 'include'}"]
    subprocess.run(["gcc", *flags, str(source / "src" / "ggml-quants.c"), "-o", str(out), "-lm"], check=True)
    return ctypes.CDLL(str(out), mode=os.RTLD_LAZY)  # names of other files that nothing here calls


@pytest.mark.slow
def test_llama_cpp_reads_the_same_float32(kind: str, ggml: ctypes.CDLL, tmp_path: Path) -> None:
    blocks = blocks_of(kind, 400, seed=3)
    size = BLOCK_TYPES[kind][0]
    theirs = np.empty((len(blocks), size), np.float32)
    name = f"dequantize_row_{kind.replace('Q', 'q') if kind.startswith('Q') else kind.lower()}"
    getattr(ggml, name)(blocks.ctypes, theirs.ctypes, ctypes.c_int64(theirs.size))
    with np.errstate(over="ignore"):
        found = numbers(only(opened(tmp_path, kind, blocks, theirs.shape))).astype(np.float32)
    assert (found.view(np.int32) == theirs.view(np.int32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("fresh", FRESH)
def test_fresh_blocks_are_those_of_llama_cpp(fresh: str, ggml: ctypes.CDLL, tmp_path: Path) -> None:
    rows = hard_rows(np.random.default_rng(5))
    theirs = blocks_of(fresh, 2 * len(rows))
    parts = only(opened(tmp_path, fresh, theirs, rows.shape))
    getattr(ggml, f"quantize_row_{fresh.lower()}_ref")(rows.ctypes, theirs.ctypes, ctypes.c_int64(rows.size))
    assert written(parts, torch.from_numpy(rows)) == {"codes": theirs.tobytes()}
