"""Hold every codec against what the software of its format reads: fixtures/coded, made once by its `make.py`.

A vector is a checkpoint of a format, and what the format's own software reads in it. Here it is opened as any
checkpoint: its numbers must be the software's, within the rounding that the index states for software that rounds.
Then the codes must come back from the numbers, the bytes from the codes, and fresh encodings be the software's bytes.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, slow
from lib.files.one_weight import codec_of, possible_codes, rewrite_nearest
from safetensors.torch import load
from torch import Tensor

from loratool import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs import CODECS
from loratool.files.codecs.codec import Parts
from loratool.files.codecs.scaled import ScaledCodes
from loratool.numerics.code_levels import Integers
from loratool.numerics.tensors import numbers_of

CODED = FIXTURES / "coded"

VECTORS: dict[str, dict[str, Any]] = json.loads((CODED / "index.json").read_text())["vectors"]

# Vectors that programs of their format read in different ways -> what the error says
REFUSED = {"gptq_v1_4bit_wrap": "as 0 or as 16"}

# How far float64 may be from it where our formula rounds in another order: (e2m1 * scale) / global scale, and the
# package divides first. By the vector's name.
ROUNDED = {"ct_nvfp4": 2.0**-52}

# Vectors whose weights are those of the file, padded with zeros: only ComfyUI's model knows their true shapes
PADDED = {"comfy_nvfp4", "comfy_mxfp8"}

EACH = [(vector, name) for vector in VECTORS if vector not in REFUSED for name in VECTORS[vector]["weights"]]

# One weight of each vector, whose shapes take turns; the others are slow but where their numbers are compared
TURNS = {
    (vector, names[i % len(names)]) for i, vector in enumerate(VECTORS) for names in [list(VECTORS[vector]["weights"])]
}

IN_TURN = [each if each in TURNS else slow(*each) for each in EACH]

FRESH = [each for each in EACH if VECTORS[each[0]]["weights"][each[1]].get("fresh")]


def over(each: list[Any]) -> pytest.MarkDecorator:
    ids = ["-".join(getattr(one, "values", one)) for one in each]
    return pytest.mark.parametrize(("vector", "name"), each, ids=ids)


@cache
def packed(name: str) -> dict[str, Tensor]:
    return load(lzma.decompress((CODED / f"{name}.safetensors.xz").read_bytes()))


def write(vector: str, folder: Path) -> Path:
    """Write a vector as a model folder."""
    known = VECTORS[vector]
    (folder / "model.safetensors").write_bytes((CODED / known["file"]).read_bytes())
    for name, content in {"config.json": known["config"], **known.get("side_files", {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def open_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    return cache(lambda vector: open_checkpoint(write(vector, tmp_path_factory.mktemp(vector))))


@pytest.fixture
def opened(vector: str, open_once: Callable[[str], Checkpoint]) -> Checkpoint:
    return open_once(vector)


@pytest.fixture
def parts(opened: Checkpoint, name: str) -> Parts:
    if CODECS["float8"].dtypes >= {opened.specs[name].dtype} or opened.specs[name].dtype == "BF16":
        pytest.skip("a weight of one tensor has no codes beside scales")
    return opened.parts_of(name)


def all_codes(parts: Parts) -> tuple[Any, Any]:
    """The codes of all rows, and their numbers."""
    matrices, rows, _ = parts.shape
    codes = codec_of(parts).codes(parts, 0, matrices * rows)
    return codes, codec_of(parts).values(parts, 0, codes)


@over(EACH)
def test_numbers_are_those_of_the_software(opened: Checkpoint, vector: str, name: str) -> None:
    known = VECTORS[vector]["weights"][name]
    expected, found = packed("expected")[f"{vector}/{name}"].double(), opened[name].double()
    if vector in PADDED:
        assert all(size % 16 == 0 and size >= real for size, real in zip(found.shape, known["shape"], strict=True))
        found = found[: known["shape"][0], : known["shape"][1]]
    assert list(found.shape) == known["shape"]
    most = known.get("relative", ROUNDED.get(vector, 0.0)) * expected.abs() + known.get("absolute", 0.0)
    assert bool(((found - expected).abs() <= most).all())
    assert not opened.faults
    assert not any(weight.note for weight in opened.weights.values())


@over(IN_TURN)
def test_rows_are_the_same_in_any_run(parts: Parts) -> None:
    codec, (codes, values) = codec_of(parts), all_codes(parts)
    nearest = codec.nearest(parts, 0, values)
    for start, stop in np.sort(np.random.default_rng(5).integers(0, len(codes) + 1, (8, 2))).tolist():
        if start < stop:
            assert np.array_equal(codec.codes(parts, start, stop), codes[start:stop])
            assert np.array_equal(codec.values(parts, start, codes[start:stop]), values[start:stop])
            assert np.array_equal(codec.nearest(parts, start, values[start:stop]), nearest[start:stop])


@over(IN_TURN)
def test_codes_come_back_from_their_numbers(parts: Parts) -> None:
    codec, (codes, values) = codec_of(parts), all_codes(parts)
    again = codes.copy()
    again[:, : values.shape[1]] = codec.nearest(parts, 0, values)
    assert np.array_equal(codec.values(parts, 0, again), values)  # where codes differ, both mean the same number
    assert again.dtype == codes.dtype == codec.code
    assert (codec.with_padding(parts, 0, codes[:, values.shape[1] :]) is parts) is not codec.padding_has_scales


@over(IN_TURN)
def test_nearest_codes_come_back_from_their_bytes(parts: Parts) -> None:
    codec = codec_of(parts)
    assert isinstance(codec, ScaledCodes)
    levels = codec.levels(parts)  # of integers whose place has more bits than they need, some codes are only read
    every = possible_codes(parts)
    used = {code for code in every if not isinstance(levels, Integers) or levels.low <= code <= levels.high}
    assert [*rewrite_nearest(parts, used)]


@over(IN_TURN)
def test_codes_are_ordered_as_their_numbers(parts: Parts) -> None:
    codec, (codes, _) = codec_of(parts), all_codes(parts)
    ordinals = codec.ordinals(parts, codes)
    assert np.array_equal(codec.from_ordinals(parts, ordinals), codes)
    rising = codec.from_ordinals(parts, np.unique(ordinals))
    numbers = [codec.values(parts, 0, np.full_like(codes[:1], code))[0] for code in rising]
    steps = np.diff(numbers, axis=0)  # up in every column, or down where its scale is negative
    assert ((steps >= 0).all(axis=0) | (steps <= 0).all(axis=0)).all()


@over(IN_TURN)
def test_bytes_come_back_from_codes(parts: Parts, opened: Checkpoint) -> None:
    codec, (codes, _) = codec_of(parts), all_codes(parts)
    stored = bytes(opened.shard_of[parts["codes"].name].read(parts["codes"].name))
    for step in (len(codes), codec.row_multiple(parts)):
        written = bytearray(each ^ 0xFF for each in stored)
        for start in range(0, len(codes), step):
            for first, data in codec.places(parts, start, codes[start : start + step]):
                written[first : first + len(data)] = data
        assert bytes(written) == stored


@over(IN_TURN)
def test_companions_are_sound(parts: Parts) -> None:
    codec_of(parts).check(parts)


@over(FRESH)
def test_fresh_bytes_are_those_of_the_software(parts: Parts, opened: Checkpoint, vector: str, name: str) -> None:
    codec, known = codec_of(parts), VECTORS[vector]
    quantizer = codec.quantizer(parts)
    if quantizer is None:
        pytest.skip(f"{codec.key} is not written with scales of its own")
    source = packed("source")[known["weights"][name]["source"]]
    source = source.float() if "weights in float32" in known["made_by"] else source
    if quantizer.sees_all:
        quantizer.see(numbers_of(source))
    together = quantizer.together or len(source)
    step = np.lcm(together, codec.row_multiple(parts))
    pieces = []
    for start in range(0, len(source), step):
        codes, more = quantizer.rows(start, numbers_of(source[start : start + step]))
        pieces += more + [("codes", first, data) for first, data in codec.places(parts, start, codes)]
    pieces += quantizer.rest()
    written = {role: bytearray(spec.nbytes) for role, spec in quantizer.specs().items()}
    for role, first, data in pieces:
        written[role][first : first + len(data)] = data
    stored = {role: bytes(opened.shard_of[each.name].read(each.name)) for role, each in parts.tensors.items()}
    if "quant_state" in written:  # blanks behind its JSON
        written["quant_state"] = written["quant_state"].rstrip(b" ")
    assert {role: bytes(data) for role, data in written.items()} == stored


@over([(vector, name) for vector in REFUSED for name in VECTORS[vector]["weights"]])
def test_what_programs_read_in_two_ways_is_refused(parts: Parts, opened: Checkpoint, vector: str, name: str) -> None:
    for read in (lambda: opened[name], lambda: codec_of(parts).check(parts)):
        with pytest.raises(InputError, match=REFUSED[vector]):
            read()


def test_every_codec_has_a_vector(open_once: Callable[[str], Checkpoint]) -> None:
    found = {weight.codec.key for vector in VECTORS for weight in open_once(vector).weights.values()}
    elsewhere = {"ggml", "comfy-awq", "comfy-rotated-int8", "comfy-rotated-int4"}  # test_ggml.py, test_comfy_rotated.py
    assert found == CODECS.keys() - {"raw", "float8"} - elsewhere
