"""Hold the safetensors reader and writer against the official library both ways, then against hostile headers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loratool.errors import InputError
from loratool.files.containers.safetensors_file import (
    TensorFile,
    build_header,
    data_order,
    edited_header,
    file_metadata,
    parse_json,
)
from loratool.files.dtypes import DTYPES, TensorSpec
from loratool.numerics.tensors import numbers_of

# One small dict of odd tensors for all tests: every dtype that torch can hand to the official writer.
TORCH_DTYPES = """bool uint8 int8 float8_e5m2 float8_e4m3fn float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz int16 uint16
    float16 bfloat16 int32 uint32 float32 complex64 float64 int64 uint64""".split()
ODD = {f"of.{name}": torch.zeros(3, 5, dtype=getattr(torch, name)) for name in TORCH_DTYPES if hasattr(torch, name)}
ODD |= {
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 7),
    "empty.too": torch.zeros(4, 0, 2, dtype=torch.int64),
    "": torch.ones(2),
    "naïve/名 前": torch.ones(3, dtype=torch.bfloat16),
    'quote"back\\slash\n\x01': torch.ones(1),
}


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_reads_what_the_official_library_writes(tmp_path: Path) -> None:
    save_file(ODD, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as official:
        assert set(file.specs) == set(official.keys()) == set(ODD)
        for name, spec in file.specs.items():
            assert list(spec.shape) == official.get_slice(name).get_shape()
            assert spec.dtype == official.get_slice(name).get_dtype()
            if ODD[name].numel():
                assert bytes(file.read(name)) == bytes(ODD[name].contiguous().view(-1).view(torch.uint8).numpy())
    assert file.metadata == {"format": "pt"}
    for name in ("scalar", "empty", "naïve/名 前", "of.float64"):
        assert torch.equal(file.tensor(name), ODD[name])


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"k": 'é"\\\n\x02'}], ids=["none", "one", "escapes"])
def test_writes_the_official_bytes(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(ODD, tmp_path / "x.safetensors", metadata=metadata)
    official = (tmp_path / "x.safetensors").read_bytes()
    file = TensorFile(tmp_path / "x.safetensors")
    header, begin = build_header(file.specs, data_order(file.specs), file.metadata)
    assert official.startswith(header)
    assert list(begin) == list(file.specs) and begin == file.begin


def test_table_has_every_dtype_of_the_official_library(tmp_path: Path) -> None:
    """Each name is accepted by the official reader with our number of bits; an invented one is not."""
    for dtype, width in DTYPES.items():
        path = raw(tmp_path / "x.safetensors", {"x": entry([8], 0, width, dtype)}, bytes(width))
        assert TensorFile(path).specs["x"].nbytes == width
        with safetensors.safe_open(path, "np") as official:
            assert official.get_slice("x").get_dtype() == dtype
    with pytest.raises(InputError, match="unknown dtype"):
        TensorFile(raw(tmp_path / "x.safetensors", {"x": entry([8], 0, 8, "F9")}, bytes(8)))


@pytest.mark.parametrize(
    "metadata", [{}, {"__metadata__": {}}, {"__metadata__": None}], ids=["absent", "empty", "null"]
)
def test_metadata_may_be_missing(tmp_path: Path, metadata: dict[str, Any]) -> None:
    path = raw(tmp_path / "x.safetensors", {**metadata, "x": entry([1], 0, 4)}, bytes(4))
    assert not TensorFile(path).metadata
    edited = edited_header(TensorFile(path).header, (), {"loratool": "{}"})
    path.write_bytes(edited + bytes(4))
    assert load_file(path)["x"].item() == 0 and TensorFile(path).metadata == {"loratool": "{}"}


def test_edit_metadata_keeps_order_and_unknown_fields(tmp_path: Path) -> None:
    header = {"b": {**entry([1], 4, 8), "note": 1}, "__metadata__": {"z": "1", "a": "2"}, "a": entry([1], 0, 4)}
    file = TensorFile(raw(tmp_path / "x.safetensors", header, bytes(8)))
    assert edited_header(file.header, ("absent",), {"a": "2"}) == struct.pack("<Q", len(file.header)) + file.header
    edited = json.loads(edited_header(file.header, ("z",), {"loratool": "x"})[8:])
    assert list(edited) == ["__metadata__", "b", "a"] and edited["__metadata__"] == {"a": "2", "loratool": "x"}
    assert edited["b"] == header["b"]


GOOD = {"x": entry([2], 0, 8), "y": entry([1], 8, 12)}
HOSTILE: dict[str, tuple[Any, bytes, int | None]] = {
    "empty file": (b"", b"", None),
    "header longer than the file": (GOOD, bytes(12), 10**6),
    "header length 2**63": (GOOD, bytes(12), 1 << 63),
    "header over 100 MB": (GOOD, bytes(12), 100_000_001),
    "truncated data": (GOOD, bytes(11), None),
    "trailing bytes": (GOOD, bytes(13), None),
    "no JSON": (b"{]", b"", None),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "NUL padding": (json.dumps(GOOD).encode() + b"\0\0", bytes(12), None),
    "a list": ([], b"", None),
    "deep nesting": (b"[" * 100_000, b"", None),
    "duplicate name": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
        None,
    ),
    "overlap": ({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}, bytes(8), None),
    "hole": ({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12), None),
    "hole at the start": ({"x": entry([1], 4, 8)}, bytes(8), None),
    "shape against size": ({"x": entry([3], 0, 8)}, bytes(8), None),
    "shape overflow": ({"x": entry([1 << 40, 1 << 40], 0, 8)}, bytes(8), None),
    "shape past any number": ({"x": entry([1 << 62] * 40, 0, 8)}, bytes(8), None),
    "surrogate in metadata": (b'{"__metadata__":{"a":"\\ud800"}}', b"", None),
    "negative shape": ({"x": entry([-1], 0, 4)}, bytes(4), None),
    "float shape": ({"x": entry([1.0], 0, 4)}, bytes(4), None),  # type: ignore[list-item]
    "bool shape": ({"x": entry([True], 0, 4)}, bytes(4), None),
    "nan offset": (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', bytes(4), None),
    "huge integer": (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", bytes(4), None),
    "three offsets": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4), None),
    "no offsets": ({"x": {"dtype": "F32", "shape": [1]}}, bytes(4), None),
    "dtype is a list": ({"x": entry([1], 0, 4, ["F32"])}, bytes(4), None),
    "entry is a number": ({"x": 4}, bytes(4), None),
    "sub-byte end": ({"x": entry([3], 0, 2, "F4")}, bytes(2), None),
    "number in metadata": ({"__metadata__": {"a": 1}, **GOOD}, bytes(12), None),
    "metadata is a list": ({"__metadata__": [], **GOOD}, bytes(12), None),
    "infinity in a field of no meaning": (
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"y":1e999}}',
        b"",
        None,
    ),
    "a pile of lists": (b'{"x":[' + b"[]," * 2_000_000 + b"0]}", b"", None),
    "a pile of names": (b'{"__metadata__":{' + b'"a":"",' * 2_000_000 + b'"b":""}}', b"", None),
    "much text that is wide in memory": (b'{"x":"' + b"x" * 20_000_000 + "\U0001f600".encode() + b'"}', b"", None),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", None),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_a_broken_file_is_an_input_error_that_names_it(tmp_path: Path, case: str) -> None:
    header, data, length = HOSTILE[case]
    path = raw(tmp_path / "x.safetensors", header, data, length)
    if case == "empty file":
        path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        TensorFile(path)
    assert "x.safetensors" in str(caught.value)


@settings(max_examples=300)
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4))
def test_fuzzed_files_open_as_the_official_reader_sees_them_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    """Any damage is an InputError or a file that the official reader reads in the same way."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}, path, metadata={"format": "pt"}
    )
    data = bytearray(path.read_bytes())
    for at, value in flips:
        if at < len(data):
            data[at] = value
    path.write_bytes(data[: len(data) - cut] if cut < len(data) else b"")
    try:
        specs = TensorFile(path).specs
    except InputError:
        return
    with safetensors.safe_open(path, "np") as official:
        assert {n: (s.dtype, list(s.shape)) for n, s in specs.items()} == {
            n: (official.get_slice(n).get_dtype(), official.get_slice(n).get_shape())
            for n in official.keys()  # noqa: SIM118
        }


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_random_headers_never_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = raw(tmp_path_factory.mktemp("fuzz") / "x.safetensors", header)
    try:
        TensorFile(path)
    except InputError as error:
        assert error.exit_code == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), JSON, max_size=3))
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    path = raw(tmp_path_factory.mktemp("fuzz") / "x.safetensors", header)
    try:
        TensorFile(path)
    except InputError as error:
        assert error.exit_code == 3


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float16", 0.1, 0.0999755859375),
        ("bfloat16", 0.1, 0.10009765625),
        ("float32", 4.0, 4.0),
        ("float64", -2.5, -2.5),
        ("int64", 16, 16.0),
    ],
)
def test_scalars_are_read_without_torch(tmp_path: Path, dtype: str, value: float, expected: float) -> None:
    """An alpha of 0.1 stored in bf16 is the bf16 number, not 0.1."""
    for shape in ((), (1,)):
        save_file({"alpha": torch.full(shape, value, dtype=getattr(torch, dtype))}, tmp_path / "x.safetensors")
        assert TensorFile(tmp_path / "x.safetensors").scalar("alpha") == expected


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (2,)), ("float32", (0,)), ("bool", ()), ("float8_e5m2", ())])
def test_what_is_not_one_number(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    save_file({"alpha": torch.zeros(shape).to(getattr(torch, dtype))}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="should be one number, but is") as refused:
        TensorFile(tmp_path / "x.safetensors").scalar("alpha")
    assert refused.value.culprit == "alpha"


def test_only_floats_of_16_bits_and_more_are_tensors(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(2, dtype=torch.int8), "y": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    for name in tensors:
        with pytest.raises(InputError, match="not a floating-point type of 16 bits or more"):
            file.tensor(name)
        assert bytes(file.read(name)) == bytes(2)


def test_tensors_share_their_bytes_only_with_themselves(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2), "y": torch.ones(2)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.storage("x") == file.storage("x") != file.storage("y")


def test_the_metadata_of_several_files(tmp_path: Path) -> None:
    """The later ones' win; what is no safetensors file has none."""
    files = {"a": {"x": "1", "y": "1"}, "b": {"y": "2"}, "c": None}
    for name, metadata in files.items():
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors", metadata)
    (tmp_path / "x.json").write_text("{}")
    paths = [tmp_path / f"{name}.safetensors" for name in files]
    assert file_metadata([*paths, tmp_path / "x.json"]) == {"x": "1", "y": "2"}


@pytest.mark.parametrize("text", ["[[],[],[],[]]", '{"a":1,"b":2}', '"' + 900 * "x" + '"'])
def test_json_that_would_take_much_memory_is_not_parsed(text: str) -> None:
    """Python takes a hundred bytes for a member of two."""
    data = f'{{"a":{text}}}'.encode()
    assert parse_json(data, Path("x.json"), most=5000) == {"a": json.loads(text)}
    with pytest.raises(InputError, match="is JSON that would take more than 200 B of memory"):
        parse_json(data, Path("x.json"), most=200)


def test_a_header_that_the_format_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.files.containers.safetensors_file.MAX_HEADER", 999)
    specs = {f"x{i}": TensorSpec("F32", (1,)) for i in range(40)}
    with pytest.raises(InputError, match=r"the header would be \d+ bytes, above the format's limit of 999") as refused:
        build_header(specs, [*specs], None)
    assert "--max-shard-size" in (refused.value.remedy or "")


def test_no_header_is_written_that_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.files.containers.safetensors_file.MAX_PARSED", 50_000)
    for count in range(20, 80):
        specs = {f"x{i}": TensorSpec("F32", (1,)) for i in range(count)}
        try:
            header, _ = build_header(specs, [*specs], None)
        except InputError as refused:
            assert count > 40 and "--max-shard-size" in (refused.remedy or "")
            return
        (tmp_path / "x.safetensors").write_bytes(header + bytes(4 * count))
        assert len(TensorFile(tmp_path / "x.safetensors").specs) == count
    pytest.fail("is not refused")


def test_sizes_above_32_bits(tmp_path: Path) -> None:
    """Offsets beyond 4 GB, over a sparse data section."""
    specs = {"big": TensorSpec("F32", (1 << 31,)), "after": TensorSpec("F32", (2,))}
    header, begin = build_header(specs, ["big", "after"], None)
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 33) + 8)
        file.seek(begin["after"])
        file.write(struct.pack("<2f", 1.0, 2.0))
    assert TensorFile(path).tensor("after").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(dtype: str, value: float) -> None:
    for count in (1, 7, 1003):
        for at in {0, count // 2, count - 1}:
            x = torch.linspace(-3, 3, count).to(getattr(torch, dtype))
            assert numbers_of(x).all_finite()
            wide = x.float()
            wide[at] = value
            x = wide.to(x.dtype)
            assert numbers_of(x).all_finite() is bool(x.float().isfinite().all())
    assert numbers_of(torch.empty(0, 3)).all_finite()
