"""Hold the reader of GGUF files: it reads what llama.cpp writes, and what is damaged is one error, however damaged."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lib.files.gguf_bytes import entry, floats, gguf, tensor, text, write

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.containers.gguf_file import GgufArray, GgufFile
from loratool.files.containers.gguf_writer import build_gguf, type_fields, value_field
from loratool.files.containers.layouts import read_layout
from loratool.files.dtypes import GGML_TYPES, TensorSpec
from loratool.files.output.plan import plan_output

FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 1e4,
    "an.offset": -3,
    "a.flag": True,
    "tokenizer.ggml.tokens": ["<s>", "a", "ä"],
    "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
    "no.tokens": [],
    "loratool": "{}",
}

W = np.arange(12, dtype=np.float32).reshape(3, 4)

TENSORS = {
    "a.weight": floats(W),
    "b.weight": floats(W, "F16"),
    "c.weight": tensor(8, (2, 32), bytes(68)),
    "d.bias": floats(W[0], "BF16"),
}


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 32), (3, 64), (3, 8)])
def test_read(tmp_path: Path, version: int, alignment: int) -> None:
    file = GgufFile(write(tmp_path / "m.gguf", FIELDS, TENSORS, version, alignment))
    assert file.version == version and file.alignment == alignment and file.architecture == "llama"
    assert [*file.specs] == [*TENSORS] and file.metadata == {"loratool": "{}"}
    assert file.specs["a.weight"] == TensorSpec("F32", (3, 4)) and file.specs["c.weight"] == TensorSpec("Q8_0", (2, 32))
    for name, (_, _, data) in TENSORS.items():
        assert bytes(file.read(name)) == data
    assert (file.tensor("b.weight").numpy() == W).all() and (file.tensor("d.bias").float().numpy() == W[0]).all()
    scalars = {key: value for key, value in file.fields.items() if isinstance(value, str | int | float)}
    assert scalars == {**{k: v for k, v in FIELDS.items() if not isinstance(v, list)}} | (
        {} if alignment == 32 else {"general.alignment": alignment}
    )
    assert [*file.fields["tokenizer.ggml.tokens"]] == FIELDS["tokenizer.ggml.tokens"]
    assert file.fields["tokenizer.ggml.scores"][1:] == (-1.0, 2.0) and len(file.fields["no.tokens"]) == 0
    file.close()


def test_the_model_is_a_checkpoint_by_its_first_bytes(tmp_path: Path) -> None:
    write(tmp_path / "model", FIELDS, TENSORS)
    model = open_checkpoint(tmp_path / "model")
    assert [*model.stored] == [*TENSORS] and model.metadata == {"loratool": "{}"} and model.config == {}
    model.close()
    (tmp_path / "model").rename(tmp_path / "m.gguf")
    model = open_checkpoint(tmp_path)
    assert model.shards[0].path == tmp_path / "m.gguf"
    model.close()
    write(tmp_path / "n.gguf", FIELDS, TENSORS)
    with pytest.raises(InputError, match=r"several GGUF models \(m.gguf, n.gguf\)"):
        open_checkpoint(tmp_path)


def _split(folder: Path, count: int = 2, number: int = 1) -> Path:
    for at, names in enumerate((["a.weight", "b.weight"], ["c.weight", "d.bias"])):
        fields = {"split.no": at, "split.count": count, "split.tensors.count": 4}
        own = {name: TENSORS[name] for name in names}
        write(folder / f"m-{at + 1:05d}-of-00002.gguf", {**(FIELDS if not at else {}), **fields}, own)
    return folder / f"m-{number:05d}-of-00002.gguf"


def test_a_split_model_is_opened_by_its_first_part(tmp_path: Path) -> None:
    for path in (_split(tmp_path), tmp_path):
        model = open_checkpoint(path)
        assert [*model.stored] == [*TENSORS] and len(model.shards) == 2
        model.close()
    with pytest.raises(InputError, match="is part 2 of 2"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match="is missing"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="but its name does not say so"):
        open_checkpoint(_split(tmp_path, 3))


@pytest.mark.parametrize(
    ("fields", "names", "message"),
    [
        ({"split.no": 0, "split.count": 2}, ["c.weight"], "is part 0 of 2 by its fields, counted from 0, and not 1"),
        ({"split.no": 1, "split.count": 3}, ["c.weight"], "is part 1 of 3 by its fields"),
        ({}, ["c.weight"], "is part 0 of 1 by its fields"),
        ({"split.no": 1, "split.count": 2}, ["c.weight", "a.weight"], "is in both m-00001-of-00002.gguf and m-0"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], names: list[str], message: str) -> None:
    first = _split(tmp_path)
    write(tmp_path / "m-00002-of-00002.gguf", fields, {name: TENSORS[name] for name in names})
    with pytest.raises(InputError, match=message):
        open_checkpoint(first)


@pytest.mark.parametrize("fields", [{"split.no": "0", "split.count": 2}, {"split.no": 0, "split.count": [2]}])
def test_parts_that_are_counted_by_no_numbers(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = write(tmp_path / "m-00001-of-00002.gguf", fields, TENSORS)
    with pytest.raises(InputError, match=r"has .* as split\.(no|count)"):
        open_checkpoint(path)


def test_a_split_model_is_planned_in_its_parts(tmp_path: Path) -> None:
    """Each with its own fields, of which the first tells of the merge."""
    model = open_checkpoint(_split(tmp_path))
    output = plan_output(model, tmp_path / "out", False, "{}", ["a.weight"], container=model.container)
    for planned, part in zip(output.files, model.shards, strict=True):
        data = planned.header + bytes(planned.nbytes - len(planned.header))
        (tmp_path / "again.gguf").write_bytes(data)
        found = GgufFile(tmp_path / "again.gguf")
        assert planned.name == part.path.name and found.specs == part.specs and found.begin == planned.begin
        told = {"loratool": "{}", "general.quantization_version": "2"} if part is model.shards[0] else {}
        assert isinstance(part, GgufFile) and found.described_fields() == part.described_fields() | told


def test_what_is_told_of_fields(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "m.gguf", {**FIELDS, "a.text": "x" * 999}, TENSORS))
    told = file.described_fields()
    assert told.keys() == file.fields.keys() and told["general.architecture"] == "llama"
    assert told["llama.block_count"] == "2" and all(len(value) < 200 for value in told.values())


@pytest.mark.parametrize("place", ["between", "behind"])
def test_a_file_with_more_than_zeros_between_its_tensors(tmp_path: Path, place: str) -> None:
    data = bytearray(gguf(FIELDS, TENSORS))
    file = GgufFile(write(tmp_path / "m.gguf", FIELDS, TENSORS))
    assert file.is_plain()
    data[file.begin["b.weight"] - 1 if place == "between" else -1] = 7
    (tmp_path / "m.gguf").write_bytes(data)
    assert not GgufFile(tmp_path / "m.gguf").is_plain()
    (tmp_path / "m.gguf").write_bytes(gguf(FIELDS, TENSORS) + bytes(32))
    assert not GgufFile(tmp_path / "m.gguf").is_plain()


def test_a_layout_is_that_of_the_file(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "m.gguf", FIELDS, TENSORS))
    found = read_layout(file.header, tmp_path)
    assert (found.container, dict(found.specs), dict(found.begin)) == ("gguf", file.specs, file.begin)
    assert found.nbytes == (tmp_path / "m.gguf").stat().st_size
    for header in (file.header + bytes(32), file.header[:-1]):
        with pytest.raises(InputError):
            read_layout(header, tmp_path)


def test_a_type_that_no_gguf_file_has() -> None:
    with pytest.raises(InputError, match="is F8_E4M3, which GGUF files cannot store") as refused:
        build_gguf([], {"x": TensorSpec("F8_E4M3", (2, 2))}, 32, 3)
    assert refused.value.culprit == "x"


@pytest.mark.parametrize(("after", "told"), [("F16", 1), ("BF16", 32), ("F32", None)])
def test_the_type_of_the_file_follows_its_matrices(tmp_path: Path, after: str, told: int | None) -> None:
    """By the numbers of llama.cpp's `llama_ftype`; vectors do not count."""
    file = GgufFile(write(tmp_path / "m.gguf", {"general.file_type": 0}, {"w": floats(W), "v": floats(W[0], "F16")}))
    found = type_fields(file, file.specs, {**file.specs, "w": TensorSpec(after, (3, 4))})
    assert found == ({} if told is None else {"general.file_type": entry("general.file_type", told)})


def _info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _file(tensors: list[bytes], fields: bytes = b"", count: int = 0, data: int = 256) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + fields + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


GOOD = gguf(FIELDS, TENSORS)
KEY = text("key")

BAD = {
    "too short for its magic": (b"GG", "does not begin with GGUF"),
    "another magic": (b"GGML" + GOOD[4:], "does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], "version 1, not 2 or 3"),
    "version 4": (b"GGUF" + struct.pack("<I", 4) + GOOD[8:], "version 4, not 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
    "1e9 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 10**9, 0), "claims 1000000000 tensors"),
    "1e12 fields": (b"GGUF" + struct.pack("<IQQ", 3, 0, 10**12), "and 1000000000000 fields"),
    "a long key": (_file([], struct.pack("<Q", 1 << 40), 1), "a key at byte 32 should take 1099511627776"),
    "a long string": (_file([], KEY + struct.pack("<IQ", 8, 1 << 63), 1), "in key a string"),
    "a long array": (_file([], KEY + struct.pack("<IIQ", 9, 10, 1 << 61), 1), "the array key"),
    "many strings": (_file([], KEY + struct.pack("<IIQ", 9, 8, 1 << 60), 1), "an array of 1152921504606846976 strings"),
    "a long string in an array": (_file([], KEY + struct.pack("<IIQQ", 9, 8, 2, 1 << 50), 1), "a string at byte"),
    "a long text": (_file([], struct.pack("<Q", 70_000) + bytes(70_000), 1, 1 << 17), "at most 65536 belong"),
    "nested arrays": (
        _file([], KEY + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 9, 1),
        "arrays in an array",
    ),
    "an unknown type of field": (_file([], KEY + struct.pack("<II", 13, 0), 1), "unknown type 13"),
    "an unknown type of elements": (_file([], KEY + struct.pack("<IIQ", 9, 13, 1), 1), "unknown type 13"),
    "a key twice": (_file([], (KEY + struct.pack("<II", 4, 0)) * 2, 2), "the key key twice"),
    "an empty key": (_file([], text("") + struct.pack("<II", 4, 0), 1), "empty key"),
    "a key that is no text": (_file([], text(b"\xff") + struct.pack("<II", 4, 0), 1), "not UTF-8"),
    "alignment 24": (gguf({}, TENSORS, alignment=24), "general.alignment of 24"),
    "alignment 0": (gguf({"general.alignment": 0}, TENSORS), "general.alignment of 0"),
    "alignment of text": (gguf({"general.alignment": "32"}, TENSORS), "general.alignment of '32'"),
    "an unknown type": (_file([_info("t", (32,), 31, 0)]), "ggml type 31"),
    "five dimensions": (_file([_info("t", (1,) * 5, 0, 0)]), "5 dimensions"),
    "too large": (_file([_info("t", (1 << 40, 1 << 40), 0, 0)]), "more bytes than any file"),
    "a dimension of 2**63": (_file([_info("t", (0, 1 << 63), 0, 0)]), "that no file can have"),
    "behind the end": (_file([_info("t", (65,), 0, 0)]), "would end behind"),
    "far away": (_file([_info("t", (1,), 0, 1 << 50)]), "would end behind"),
    "not aligned": (_file([_info("t", (1,), 0, 4)]), "not a multiple of 32"),
    "overlapping": (_file([_info("t", (9,), 0, 0), _info("u", (1,), 0, 32)]), "where another tensor is"),
    "the same bytes": (_file([_info("t", (1,), 0, 0), _info("u", (1,), 0, 0)]), "where another tensor is"),
    "a name twice": (_file([_info("t", (1,), 0, 0), _info("t", (1,), 0, 32)]), "is twice in"),
    "half a block": (_file([_info("t", (48,), 8, 0)]), "rows of 48 numbers"),
    "no block in a number": (_file([_info("t", (), 8, 0)]), "rows of 1 numbers"),
    "half a header": (GOOD[: len(GOOD) // 3], "cut off"),
    "a lost tail": (GOOD[:-64], "would end behind"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_is_one_error(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        GgufFile(tmp_path / "m.gguf")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_long_list_of_tokens_costs_no_memory(tmp_path: Path) -> None:
    tokens = [f"token{i}" for i in range(60_000)]
    path = write(tmp_path / "m.gguf", {"tokens": tokens, "after": 7}, TENSORS)
    tracemalloc.start()
    file = GgufFile(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert file.fields["after"] == 7 and len(file.fields["tokens"]) == 60_000
    assert [*file.fields["tokens"]] == tokens
    file.close()


def test_an_array_that_no_model_has_is_not_read(tmp_path: Path) -> None:
    """A hole in a file costs nothing, and its numbers would cost gigabytes."""
    path, count = tmp_path / "m.gguf", 1 << 28
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry("general.architecture", "llama")
    head += text("llama.attention.head_count") + struct.pack("<IIQ", 9, 4, count)
    with path.open("wb") as out:
        out.write(head)
        out.truncate(-(-(len(head) + 4 * count) // 32) * 32)
    with closing(open_checkpoint(path)) as model:
        assert model.config == {}
        with pytest.raises(InputError, match=f"has an array of {count} elements"):
            len([*model.shards[0].fields["llama.attention.head_count"]])


def _mutated(count: int) -> Iterator[bytes]:
    """Copies of a good file with some bytes of the header changed, removed or doubled."""
    draw = random.Random(7)
    end = len(GOOD) - sum(len(data) + -len(data) % 32 for _, _, data in TENSORS.values())
    for _ in range(count):
        data = bytearray(GOOD)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(4, end)
            match draw.randrange(4):
                case 0:
                    data[at] = draw.randrange(256)
                case 1:
                    data[at] ^= 1 << draw.randrange(8)
                case 2:
                    del data[at : at + draw.choice((1, 4, 8, 32))]
                case _:
                    data[at:at] = data[at : at + draw.choice((1, 4, 8, 32))]
        yield bytes(data)


@pytest.mark.slow
def test_2000_mutated_headers_are_read_as_gguf_py_does_or_refused(tmp_path: Path) -> None:
    gguf_py = pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    path, read, refused_by_it = tmp_path / "m.gguf", 0, []
    for data in _mutated(2000):
        path.write_bytes(data)
        try:
            file = GgufFile(path)
        except InputError:
            continue
        read += 1
        try:
            theirs = gguf_py.GGUFReader(path)
        except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
            refused_by_it.append(error)
            continue
        assert {each.name: (int(each.tensor_type), tuple(map(int, each.shape))) for each in theirs.tensors} == {
            name: (GGML_TYPES[spec.dtype][0], spec.shape[::-1]) for name, spec in file.specs.items()
        }
        assert {each.name: int(each.data_offset) for each in theirs.tensors} == file.begin
        for key, value in file.fields.items():
            with suppress(UnicodeDecodeError):  # which gguf-py meets when it is asked, and is escapes here
                told = theirs.fields[key].contents()
                assert repr(told) == repr([*value] if isinstance(value, GgufArray) else value), key
        file.close()
    assert read > 100 and len(refused_by_it) < read / 10, (read, refused_by_it[:5])


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (True, struct.pack("<I?", 7, True)),
        (2**32 - 1, struct.pack("<II", 4, 2**32 - 1)),
        (-3, struct.pack("<Ii", 5, -3)),
        (2**40, struct.pack("<IQ", 10, 2**40)),
        (-(2**40), struct.pack("<Iq", 11, -(2**40))),
        (0.5, struct.pack("<If", 6, 0.5)),
        (0.1, struct.pack("<Id", 12, 0.1)),
        (1e300, struct.pack("<Id", 12, 1e300)),
        ("ä", struct.pack("<IQ", 8, 2) + "ä".encode()),
        ([], struct.pack("<IIQ", 9, 8, 0)),
        ([1, -1], struct.pack("<IIQii", 9, 5, 2, 1, -1)),
        (["a", "b"], struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")),
    ],
)
def test_a_value_gets_the_first_type_that_holds_it(value: Any, data: bytes) -> None:
    assert value_field("key", value) == text("key") + data


@pytest.mark.parametrize("value", [2**64, [1, 0.5], [1, "a"], [[1]]])
def test_a_value_that_no_type_holds_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="for which GGUF has no type"):
        value_field("key", value)
