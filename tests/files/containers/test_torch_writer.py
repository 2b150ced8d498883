"""Hold the writer of torch files: torch, zipfile and our reader each read the archive that was planned."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import InputError
from loratool.files.containers.torch_reader import TorchFile
from loratool.files.containers.torch_writer import ALIGNMENT, Archive, joined_crc, plan_archive
from loratool.files.dtypes import DTYPE_NAMES, TensorSpec

SPECS = {f"of {dtype}": TensorSpec(dtype, (3, 5)) for dtype in DTYPE_NAMES} | {
    "scalar": TensorSpec("F32", ()),
    "empty": TensorSpec("BF16", (0, 7)),
    "empty in the middle": TensorSpec("I64", (4, 0, 2)),
    "naïve/名 前\n": TensorSpec("F16", (300,)),
    "": TensorSpec("BOOL", (70_000,)),
}
TIED = {"tied": ("of F32", SPECS["of F32"]), "of another shape": ("of F32", TensorSpec("F32", (5, 1, 3)))}


def write(path: Path, archive: Archive) -> Path:
    """Write storages of ones, in runs of 100 bytes that come in any order."""
    parts = []
    with open(path, "wb") as file:
        file.write(archive.header)
        for entry in archive.storages.values():
            file.seek(entry.begin)
            file.write(b"\1" * entry.nbytes)
            sizes = [min(100, entry.nbytes - start) for start in range(0, entry.nbytes, 100)]
            parts += [(entry.begin + 100 * i, n, zlib.crc32(b"\1" * n)) for i, n in enumerate(sizes)]
        for offset, data in archive.rest(parts[::-1]):
            file.seek(offset)
            file.write(data)
    assert path.stat().st_size == archive.nbytes
    return path


@pytest.fixture(scope="module")
def archive() -> Archive:
    return plan_archive({**{name: (name, spec) for name, spec in SPECS.items()}, **TIED})


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path: Path, archive: Archive, mmap: bool) -> None:
    state = torch.load(write(tmp_path / "x.bin", archive), weights_only=True, mmap=mmap)
    assert list(state) == [*SPECS, *TIED]
    for name, spec in SPECS.items():
        like = torch.empty(spec.shape, dtype=getattr(torch, DTYPE_NAMES[spec.dtype]))
        assert (state[name].dtype, state[name].shape, state[name].stride()) == (like.dtype, like.shape, like.stride())
        assert bytes(state[name].untyped_storage().tolist()) == b"\1" * spec.nbytes
    places = {state[name].untyped_storage().data_ptr() for name in ("of F32", *TIED)}
    assert len(places) == 1 and state["of another shape"].shape == (5, 1, 3)


def test_other_readers_of_zip_files_find_its_sums_right(tmp_path: Path, archive: Archive) -> None:
    with zipfile.ZipFile(write(tmp_path / "x.bin", archive)) as file:
        assert file.testzip() is None
        assert len(file.infolist()) == len(SPECS) + 3
        assert file.read("archive/byteorder") == b"little"


def test_what_torch_saves_has_the_same_records_and_the_same_calls(tmp_path: Path, archive: Archive) -> None:
    """torch's pickle of its own state dict and ours name the same globals in the same order."""
    import pickletools

    state = torch.load(write(tmp_path / "x.bin", archive), weights_only=True)
    torch.save(state, tmp_path / "theirs.bin")

    def calls(path: Path) -> list[object]:
        with zipfile.ZipFile(path) as file:
            root = file.namelist()[0].partition("/")[0]
            assert {f"{root}/{name}" for name in ("data.pkl", "byteorder", "version", "data/0")} <= set(file.namelist())
            code = list(pickletools.genops(file.read(f"{root}/data.pkl")))
        return [arg for op, arg, _ in code if op.name in ("GLOBAL", "BINPERSID", "REDUCE")]

    assert calls(tmp_path / "x.bin") == calls(tmp_path / "theirs.bin")


def test_our_own_reader_reads_it(tmp_path: Path, archive: Archive) -> None:
    file = TorchFile(write(tmp_path / "x.bin", archive))
    assert file.specs == {**SPECS, **{name: spec for name, (_, spec) in TIED.items()}}
    assert {name: file.begin[name] for name in SPECS} == archive.begin
    assert all(begin % ALIGNMENT == 0 for begin in file.begin.values())


def test_of_nothing(tmp_path: Path) -> None:
    assert torch.load(write(tmp_path / "x.bin", plan_archive({})), weights_only=True) == {}


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A sparse file: only the ends of its second storage are there."""
    specs = {"first": TensorSpec("U8", (5 << 30,)), "second": TensorSpec("I64", (3,))}
    archive = plan_archive({name: (name, spec) for name, spec in specs.items()})
    crc = zlib.crc32(b"\1" * 24)
    with open(tmp_path / "x.bin", "wb") as file:
        file.write(archive.header)
        file.seek(archive.begin["second"])
        file.write(b"\1" * 24)
        for offset, data in archive.rest([(archive.begin["second"], 24, crc)]):
            file.seek(offset)
            file.write(data)
    state = torch.load(tmp_path / "x.bin", weights_only=True, mmap=True)
    assert state["first"].shape == (5 << 30,) and state["first"][-1] == 0
    assert state["second"].tolist() == [0x0101010101010101] * 3
    with zipfile.ZipFile(tmp_path / "x.bin") as listed:
        assert listed.read("archive/data/1") == b"\1" * 24 and listed.getinfo("archive/data/0").file_size == 5 << 30
    assert TorchFile(tmp_path / "x.bin").specs == specs


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_type_that_torch_lacks_is_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=f"odd: is {dtype}, which torch has no type for"):
        plan_archive({"odd": ("odd", TensorSpec(dtype, (8,)))})


def test_too_many_tensors_for_our_reader_are_refused() -> None:
    spec = TensorSpec("F32", (1,))
    names = {f"{i}.{'x' * 4000}": spec for i in range(9000)}
    with pytest.raises(InputError, match="9000 tensors are too many"):
        plan_archive({name: (name, spec) for name in names})


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_joined_sums_are_those_of_the_whole(parts: list[bytes]) -> None:
    assert joined_crc([(len(part), zlib.crc32(part)) for part in parts]) == zlib.crc32(b"".join(parts))
