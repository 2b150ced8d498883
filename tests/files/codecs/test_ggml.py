"""Hold ggml's block types against their definition, number by number in fractions, and gguf-py and llama.cpp."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.files.ggml_blocks import HALVES, IN_RUNS, KINDS, NUMBERS, blocks_of
from lib.files.gguf_bytes import floats, tensor, write
from lib.files.one_weight import codec_of, numbers, only, possible_codes, rewrite_nearest, written
from lib.oracles.llama_cpp import tree

from loratool.errors import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs import gguf, gguf_blocks, gguf_codebooks
from loratool.files.codecs.gguf import BITS
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES

Array = np.ndarray[Any, np.dtype[Any]]


def opened(folder: Path, kind: str, blocks: Array, shape: tuple[int, ...], **others: Any) -> Checkpoint:
    tensors = {"x.weight": tensor(GGML_TYPES[kind][0], shape, blocks.tobytes()), **others}
    return open_checkpoint(write(folder / "m.gguf", {"general.architecture": "llama"}, tensors))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_tables_are_of_the_same_types() -> None:
    layouts = {**gguf_blocks.LAYOUTS, **gguf_codebooks.LAYOUTS}
    assert set(KINDS) == set(BITS) == set(layouts) <= set(BLOCK_TYPES)
    assert set(IN_RUNS) == set(gguf.IN_RUNS) == set(gguf_codebooks.LAYOUTS)


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


# Codes that writers use, where a file may have others
USED = {"TQ1_0": {0, 1, 2}, "TQ2_0": {0, 1, 2}}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_RUNS])
def test_nearest_codes_come_back_from_their_bytes(kind: str, tmp_path: Path) -> None:
    """Also of bytes that several of them share; gguf-py reads the same numbers in all tries."""
    parts = only(opened(tmp_path, kind, blocks_of(kind, 6), (2, 3 * BLOCK_TYPES[kind][0])))
    for data, values in rewrite_nearest(parts, USED.get(kind, set(possible_codes(parts)))):
        if kind not in ("Q1_0", "Q2_0"):  # which gguf-py does not know
            blocks = np.frombuffer(data, np.uint8).reshape(2, -1)
            with np.errstate(all="ignore"):
                theirs = _gguf_py().quants.dequantize(blocks, _gguf_py().GGMLQuantizationType[kind])
                assert np.array_equal(theirs, values.astype(np.float32))


def test_a_code_that_no_writer_uses_is_read_and_comes_back(tmp_path: Path) -> None:
    """TQ2_0 has room for one: 3, which its formula makes 2 scales."""
    blocks = blocks_of("TQ2_0", 2)
    blocks[:, :64] = 0b11100100  # all four codes in each byte
    parts = only(opened(tmp_path, "TQ2_0", blocks, (2, 256)))
    codec, (scale, other) = codec_of(parts), blocks[:, 64:].copy().view("<f2")[:, 0].astype(float)
    codec.check(parts)
    codes = codec.codes(parts, 0, 2)
    assert np.unique(numbers(parts)).tolist() == sorted({x * s for x in (-1, 0, 1, 2) for s in (scale, other)})
    assert np.array_equal(codec.from_ordinals(parts, codec.ordinals(parts, codes[:, :256])), codes[:, :256])
    ((_, data),) = codec.places(parts, 0, codes)
    assert data == blocks.tobytes()
    assert codec.nearest(parts, 0, numbers(parts)).max() == 2


def test_a_scale_in_nibbles_that_is_no_number_is_refused(tmp_path: Path) -> None:
    blocks = blocks_of("IQ1_M", 4)
    blocks[3, 49:56:2] = blocks[3, 49:56:2] & 15 | np.array([0, 0, 12, 7], np.uint8) << 4  # 0x7c00
    parts = only(opened(tmp_path, "IQ1_M", blocks, (2, 512)))
    with pytest.raises(InputError, match=r"x.weight: holds scales that are nan or infinite"):
        codec_of(parts).check(parts)


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
    parts = only(opened(tmp_path, "Q4_1", blocks, (2, 2, 32), **{"x.scale": floats(np.array([1, np.nan], np.float32))}))
    with pytest.raises(InputError, match=r"x.scale: holds nan or inf"):
        codec_of(parts).check(parts)


def test_a_vector_has_no_codes(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "Q8_0", blocks_of("Q8_0", 2), (64,))
    assert not checkpoint.weights and checkpoint.faults["x.weight"] == "has codes, but is a vector"


@pytest.mark.parametrize("unread", sorted(BLOCK_TYPES.keys() - BITS.keys()))
def test_types_of_no_file_are_known_and_not_read(unread: str, tmp_path: Path) -> None:
    size, nbytes = BLOCK_TYPES[unread]
    checkpoint = opened(tmp_path, unread, np.zeros((4, nbytes), np.uint8), (2, 2 * size))
    assert checkpoint.coded["x.weight"].format == f"GGUF {unread}" and checkpoint.coded["x.weight"].size == 4 * size


def _gguf_py() -> Any:
    return pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")


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
