"""What is refused of patches of other programs: forged, cut and damaged ones, and changes that a dialect cannot say."""

from __future__ import annotations

import json
import os
import random
import resource
import sqlite3
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from conftest import ROOT, few
from dialect_models import applied, models, pairs, without_nan
from lib.oracles import naive_dialects as naive
from lib.oracles.naive_dialects import Model, as_tensor, raw, same
from safetensors.torch import load_file, save, save_file

from loratool.errors import InputError, LoratoolError, MachineError, NeedsFlag, UsageError
from loratool.patches.dialects import compression
from loratool.patches.dialects.table import describe_patch, find_dialect, open_foreign_patch
from loratool.patches.dialects.table import write_foreign_patch as write

INDEX, MANIFEST, SPARSE = "model.safetensors.index.json", "manifest.json", "sparse_update_manifest.json"
BASE, TARGET = without_nan(models())
FEW = "bfloat16.few"
ALLOW = ["unverified"]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    tensors, metadata = load_file(path), naive.metadata_of(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def frame(data: bytes) -> torch.Tensor:
    return as_tensor(zstandard.ZstdCompressor(level=1).compress(data))


def disk(at: Path, encoding: str = "xor") -> Path:
    return naive.write_disk_delta(at / "weight_v000001", BASE, TARGET, 1, encoding)


def skyrl(at: Path) -> Path:
    return naive.write_skyrl(at / "delta-00000001", BASE, TARGET)


def prime(at: Path) -> Path:
    return naive.write_prime_rl(at / "step_1", BASE, TARGET)


def fireworks(at: Path) -> Path:
    return naive.write_fireworks(at / "f", BASE, TARGET)


def trl(at: Path, encoding: str = "raw") -> Path:
    return naive.write_trl(at / "step_000001.safetensors", BASE, TARGET, encoding=encoding)


def file_of(folder: Path, name: str = FEW) -> Path:
    return next(path for path in folder.glob("*.safetensors") if name in load_file(path))


def forged_overwrite(at: Path, places: list[int], values: bytes, count: int | None = None) -> Path:
    """Write a disk delta by overwrite with these positions, its checksum that of the target."""
    folder = disk(at, "overwrite")
    data = struct.pack(f"<{len(places) + 1}I", len(places) if count is None else count, *places) + values
    edit_tensors(file_of(folder), lambda t, m: t.update({FEW: frame(data)}))
    return folder


def forged_sparse(at: Path, places: list[int], sum_too: bool = True) -> Path:
    """Write an update of prime-rl with these positions, and the right checksum of them."""
    folder = prime(at)

    def change(content: Any) -> None:
        row = next(row for row in content["tensors"] if row["name"] == FEW)
        stored, values = torch.tensor(places, dtype=torch.int32), torch.ones(len(places)).bfloat16()
        new = {row["indices"]: stored, row["values"]: values}
        edit_tensors(folder / content["patch_file"], lambda t, m: t.update(new))
        row["changed_numel"] = len(places)
        if sum_too:
            row["checksum"] = torch.hash_tensor(stored).item() ^ torch.hash_tensor(values).item()

    edit(folder / SPARSE, change)
    return folder


def with_index(**fields: Any) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        folder = disk(at)
        edit(folder / INDEX, lambda content: content["metadata"].update(fields))
        return folder

    return make


def without_index(field: str) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        folder = disk(at)
        edit(folder / INDEX, lambda content: content["metadata"].pop(field))
        return folder

    return make


def with_row(make: Callable[[Path], Path], manifest: str, **fields: Any) -> Callable[[Path], Path]:
    """Change fields of the first tensor; None removes one."""

    def made(at: Path) -> Path:
        folder = make(at)

        def change(content: Any) -> None:
            row = content["tensors"][0]
            row.update(fields)
            for field in [field for field, value in fields.items() if value is None]:
                row.pop(field)

        edit(folder / manifest, change)
        return folder

    return made


def with_manifest(make: Callable[[Path], Path], manifest: str, **fields: Any) -> Callable[[Path], Path]:
    def made(at: Path) -> Path:
        folder = make(at)
        edit(folder / manifest, lambda content: content.update(fields))
        return folder

    return made


def with_tensors(
    make: Callable[[Path], Path], change: Callable[[dict[str, Any], dict[str, str]], object]
) -> Callable[[Path], Path]:
    def made(at: Path) -> Path:
        path = make(at)
        edit_tensors(file_of(path) if path.is_dir() else path, change)
        return path

    return made


def twice(at: Path, differ: bool) -> Path:
    """Publish a tensor from two stages."""
    folder = disk(at)
    tensors = {FEW: load_file(file_of(folder))[FEW]}
    metadata = {FEW: naive.metadata_of(file_of(folder))[FEW]}
    if differ:
        tensors[FEW] = frame(bytes(BASE[FEW].nbytes))
    save_file(tensors, folder / "model-00002-of-00003.safetensors", metadata)
    return folder


def renamed_row(at: Path) -> Path:
    folder = skyrl(at)
    edit(folder / MANIFEST, lambda content: content["tensors"].append(content["tensors"][0]))
    return folder


def with_zlib(at: Path) -> Path:
    folder, data = skyrl(at), zlib.compress(naive.xor(raw(BASE[FEW]), raw(TARGET[FEW])))

    def change(content: Any) -> None:
        row = next(row for row in content["tensors"] if row["name"] == FEW)
        row["compressed_num_bytes"] = len(data)
        save_file({row["payload_key"]: as_tensor(data)}, folder / row["payload_file"])

    edit(folder / MANIFEST, change)
    return folder


NBYTES = BASE[FEW].nbytes
SIZE = BASE[FEW].numel()

# what -> how it is made, what the error says
FORGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown encoding": (with_index(delta_encoding="add"), "encoding 'add', which is none of xor, overwrite"),
    "unknown compression": (with_index(compression_format="lz4"), "compressed by 'lz4'"),
    "unknown checksum": (with_index(checksum_format="crc32"), "checksums by 'crc32', which is none of"),
    "checksum that is a list": (with_index(checksum_format=[1]), "checksums by \\[1\\]"),
    "a version that is no text": (with_index(version=7), "version 7, which is no number in a text"),
    "a version that is no number": (with_index(base_version="v1"), "version 'v1'"),
    "no checksum format": (without_index("checksum_format"), "has no checksum_format"),
    "no base version": (without_index("base_version"), "has no base_version"),
    "no checksum": (with_tensors(disk, lambda t, m: m.pop(FEW)), "has no checksum, which its index says it has"),
    "another base": (with_tensors(disk, lambda t, m: m.update({FEW: "0" * 32})), "another base, or a damaged patch"),
    "a frame of another length": (
        with_tensors(disk, lambda t, m: t.update({FEW: frame(b"1234")})),
        f"is of 4 bytes, and the base's tensor has {NBYTES}",
    ),
    "no frame": (with_tensors(disk, lambda t, m: t.update({FEW: as_tensor(b"1234")})), "is not a frame"),
    "an empty frame": (with_tensors(disk, lambda t, m: t.update({FEW: as_tensor(b"")})), "is not a frame"),
    "a frame and more": (
        with_tensors(disk, lambda t, m: t.update({FEW: torch.cat([t[FEW], t[FEW]])})),
        "is followed by other bytes",
    ),
    "two dimensions": (with_tensors(disk, lambda t, m: t.update({FEW: t[FEW][None]})), "instead of a run of bytes"),
    "numbers": (with_tensors(disk, lambda t, m: t.update({FEW: torch.ones(3)})), "instead of a run of bytes"),
    "twice, differing": (lambda at: twice(at, True), "is also in .*, with another change"),
    "positions that repeat": (lambda at: forged_overwrite(at, [3, 3], b"ab"), "do not rise, or repeat"),
    "positions that fall": (lambda at: forged_overwrite(at, [4, 3], b"ab"), "do not rise, or repeat"),
    "a position beyond": (lambda at: forged_overwrite(at, [3, NBYTES], b"ab"), f"position {NBYTES} of a tensor of"),
    "too many positions": (lambda at: forged_overwrite(at, [3], b"a", 1 << 31), "says 2147483648 bytes"),
    "too few positions": (lambda at: forged_overwrite(at, [3, 4], b"ab", 1), "declares 14 bytes instead of 9"),
    "too few bytes": (lambda at: forged_overwrite(at, [3, 4, 5], b"ab"), "is of 18 bytes"),
    "SkyRL, payload above": (with_row(skyrl, MANIFEST, payload_file="../x.safetensors"), "not one beside it"),
    "SkyRL, payload in a folder": (with_row(skyrl, MANIFEST, payload_file="a/x.safetensors"), "not one beside it"),
    "SkyRL, payload on a drive": (with_row(skyrl, MANIFEST, payload_file="C:x.safetensors"), "not one beside it"),
    "SkyRL, no payload": (with_row(skyrl, MANIFEST, payload_file=None), "not one beside it"),
    "SkyRL, payload listed above": (with_manifest(skyrl, MANIFEST, payload_files=["../x"]), "not one beside it"),
    "SkyRL, payload that is absent": (with_manifest(skyrl, MANIFEST, payload_files=["x"]), "No such file"),
    "SkyRL, key that is absent": (with_row(skyrl, MANIFEST, payload_key="x"), "has no tensor 'x'"),
    "SkyRL, no checksum": (with_row(skyrl, MANIFEST, checksum=None), "has no checksum"),
    "SkyRL, another algorithm": (with_row(skyrl, MANIFEST, checksum_algorithm="md5"), "checksums by 'md5'"),
    "SkyRL, another type": (with_row(skyrl, MANIFEST, dtype="float16"), "is of F16 .*, and the base's tensor is BF16"),
    "SkyRL, no type": (with_row(skyrl, MANIFEST, dtype="f99"), "of no known type and shape"),
    "SkyRL, a negative shape": (with_row(skyrl, MANIFEST, shape=[-1, 3]), "of no known type and shape"),
    "SkyRL, another shape": (with_row(skyrl, MANIFEST, shape=[1, 2]), "with .* bytes"),
    "SkyRL, another size": (with_row(skyrl, MANIFEST, compressed_num_bytes=3), "has not 3 bytes in"),
    "SkyRL, twice": (renamed_row, "twice"),
    "SkyRL, a version in words": (with_manifest(skyrl, MANIFEST, version="7"), "version '7', which is no whole number"),
    "prime-rl, another version": (with_manifest(prime, SPARSE, version=2), "version 2, not of"),
    "prime-rl, file above": (with_manifest(prime, SPARSE, patch_file="../x"), "not one beside it"),
    "prime-rl, positions that repeat": (lambda at: forged_sparse(at, [3, 3]), "do not rise, or repeat"),
    "prime-rl, positions that fall": (lambda at: forged_sparse(at, [4, 3]), "do not rise, or repeat"),
    "prime-rl, a negative position": (lambda at: forged_sparse(at, [-1, 3]), "do not rise, or repeat"),
    "prime-rl, a position beyond": (lambda at: forged_sparse(at, [3, SIZE]), f"position {SIZE} of a tensor of"),
    "prime-rl, another sum": (lambda at: forged_sparse(at, [3, 4], sum_too=False), "is damaged: its positions"),
    "prime-rl, another type": (with_row(prime, SPARSE, dtype="float16"), "numbers of F16"),
    "prime-rl, another shape": (with_row(prime, SPARSE, shape=[1]), "and the base's tensor is"),
    "prime-rl, another count": (with_row(prime, SPARSE, changed_numel=1), "instead of 1 positions"),
    "prime-rl, no positions": (with_row(prime, SPARSE, indices="x"), "has no positions or no numbers"),
    "Fireworks, another base": (with_tensors(fireworks, lambda t, m: m.update({FEW: "1"})), "another base"),
    "Fireworks, no compression": (
        with_tensors(fireworks, lambda t, m: t.update({FEW: as_tensor(b"12345")})),
        "neither zstd nor zlib",
    ),
    "Fireworks, a tensor less": (
        with_tensors(fireworks, lambda t, m: (t.pop(FEW), m.pop(FEW))),
        "names every tensor of its base",
    ),
    "TRL, positions that repeat": (
        with_tensors(trl, lambda t, m: t[f"{FEW}.idx"].fill_(3)),
        "do not rise, or repeat",
    ),
    "TRL, a position beyond": (
        with_tensors(trl, lambda t, m: t[f"{FEW}.idx"][-1:].fill_(SIZE)),
        f"position {SIZE} of a tensor of",
    ),
    "TRL, gaps beyond": (
        with_tensors(lambda at: trl(at, "gap_delta"), lambda t, m: t[f"{FEW}.idx"][-1:].view(torch.int16).fill_(-1)),
        "of a tensor of",
    ),
    "TRL, numbers of another type": (
        with_tensors(trl, lambda t, m: t.update({f"{FEW}.val": t[f"{FEW}.val"].half()})),
        "of F16 .* as numbers",
    ),
    "SkyRL, zlib": (with_zlib, "is not a frame of Zstandard"),
    "TRL, nvCOMP": (
        with_tensors(trl, lambda t, m: m.update(encoding="nvcomp_cascaded")),
        "by nvCOMP, which only a GPU reads",
    ),
    "TRL, no encoding": (with_tensors(trl, lambda t, m: m.pop("encoding")), "encoding None"),
    "TRL, another encoding": (with_tensors(trl, lambda t, m: m.update(encoding="gap_delta")), "as positions"),
    "TRL, another version": (with_tensors(trl, lambda t, m: m.update(version="2")), "is of version '2'"),
    "TRL, a version in words": (with_tensors(trl, lambda t, m: m.update(model_version="x")), "model_version 'x'"),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged(what: str, tmp_path: Path) -> None:
    make, says = FORGED[what]
    path = make(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        applied(path, BASE, ALLOW)
    assert str(tmp_path) in str(error.value)


def test_one_change_from_two_stages(tmp_path: Path) -> None:
    """slime's stages both publish tied weights; SGLang would apply it twice."""
    assert same(applied(twice(tmp_path, False), BASE), TARGET)


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    folder = disk(tmp_path)
    (file_of(folder)).unlink()
    with pytest.raises(InputError, match="lists .*, which is in no file beside it"):
        open_foreign_patch(folder)
    folder = disk(tmp_path / "b")
    edit(folder / INDEX, lambda content: content["weight_map"].pop(FEW))
    with pytest.raises(InputError, match="does not list"):
        open_foreign_patch(folder)
    folder = disk(tmp_path / "c")
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match="has no model.safetensors.index.json"):
        open_foreign_patch(folder)
    folder = skyrl(tmp_path)
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match="has no manifest.json"):
        open_foreign_patch(folder)
    folder = prime(tmp_path)
    (folder / SPARSE).unlink()
    with pytest.raises(InputError, match="has no sparse_update_manifest.json"):
        open_foreign_patch(folder)
    (folder := tmp_path / "t").mkdir()
    for version in (1, 2):
        naive.write_trl(folder / f"step_{version:06d}.safetensors", BASE, TARGET, version)
    with pytest.raises(InputError, match="has several patches"):
        open_foreign_patch(folder)


def test_what_an_option_allows(tmp_path: Path) -> None:
    with pytest.raises(NeedsFlag, match="no check of .*: nothing proves the base or the result") as error:
        applied(trl(tmp_path), BASE)
    assert error.value.flags == "--allow unverified" and error.value.exit_code == 4
    less = {name: x for name, x in BASE.items() if name != FEW}
    for make in (disk, skyrl, prime):
        with pytest.raises(NeedsFlag, match=f"changes {FEW}, which the base does not have") as error:
            applied(make(tmp_path), less)
        assert error.value.flags == "--allow unknown"
        found = applied(make(tmp_path / "again"), less, ["unknown"])
        assert same(found, {name: x for name, x in TARGET.items() if name != FEW})
    folder = prime(tmp_path / "unchecked")
    edit(folder / SPARSE, lambda content: [row.pop("checksum") for row in content["tensors"]])
    with pytest.raises(NeedsFlag):
        applied(folder, BASE)
    assert same(applied(folder, BASE, ALLOW), TARGET)


def test_what_is_named_and_not_read(tmp_path: Path) -> None:
    pickled = tmp_path / "arc3.safetensors"
    save_file({FEW: as_tensor(b"ARC3_ENVELOPE\0" + b"\x80\x04.")}, pickled, {FEW: "1"})
    database = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("create table deltas (a)")
    (tmp_path / "x.wdelta").write_bytes(b"wdelta\0" + bytes(20))
    (tmp_path / "x.znn").write_bytes(b"ZN" + bytes(20))
    for path, key, says in (
        (pickled, "arc_v3", "a pickle, which is a program"),
        (database, "reminis", "an SQLite database"),
        (tmp_path / "x.wdelta", "deltatensors", "lossy"),
        (tmp_path / "x.znn", "zipnn", "a whole model without a base"),
    ):
        found = find_dialect(path)
        assert found is not None and found.key == key and found.write is None
        with pytest.raises(InputError, match=says) as error:
            describe_patch(path)
        assert error.value.remedy
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no patch of a known kind"):
        open_foreign_patch(tmp_path / "empty")
    with pytest.raises(UsageError, match="none of disk-delta, skyrl, arc_v2, prime-rl, trl"):
        write("reminis", [], tmp_path / "o")


def model(**tensors: torch.Tensor) -> Model:
    return tensors


ONES = torch.ones(3, 4, dtype=torch.bfloat16)
OPTIONS: dict[str, dict[str, Any]] = {
    "disk-delta": {"step": 1},
    "skyrl": {"step": 1},
    "arc_v2": {"files": {"x": "model.safetensors"}},
    "prime-rl": {"step": 1},
    "trl": {"step": 1},
}


@pytest.mark.parametrize("dialect", OPTIONS)
def test_a_change_that_no_dialect_can_say(dialect: str, tmp_path: Path) -> None:
    for base, target, says in (
        (model(), model(x=ONES), "is a new tensor"),
        (model(x=ONES), model(), "is removed"),
        (model(x=ONES), model(x=ONES.T.contiguous()), "and becomes"),
        (model(x=ONES), model(x=ONES.half()), "and becomes"),
    ):
        with pytest.raises(InputError, match=f"^x: .*{says}"):
            write(dialect, pairs(base, target), tmp_path / "o", **OPTIONS[dialect])
    assert not [*tmp_path.iterdir()]


def test_a_change_that_one_dialect_cannot_say(tmp_path: Path) -> None:
    nan = model(x=torch.full((3, 4), float("nan"), dtype=torch.bfloat16))
    for dialect, base, target, says in (
        ("trl", model(x=ONES), nan, "has a NaN, by which vLLM marks what stays"),
        ("trl", model(x=ONES.half()), model(x=ONES.half() * 2), "casts everything to bf16"),
        ("trl", model(x=ONES.char()), model(x=ONES.char() * 2), "casts everything to bf16"),
        ("prime-rl", model(x=ONES.to(torch.float8_e4m3fn)), model(x=ONES.to(torch.float8_e4m3fn)), "has no checksum"),
        ("skyrl", model(x=ONES.to(torch.complex64)), model(x=ONES.to(torch.complex64)), "SkyRL does not know"),
    ):
        with pytest.raises(InputError, match=says):
            write(dialect, pairs(base, target), tmp_path / "o", step=1)
    assert not [*tmp_path.iterdir()]


def test_overwrite_counts_in_32_bits(tmp_path: Path) -> None:
    from loratool.files.dtypes import TensorSpec
    from loratool.patches.dialects.patch import TensorPair

    spec = TensorSpec("BF16", (1 << 31,))
    pair = TensorPair("x", spec, spec, lambda: iter(()), lambda: iter(()))
    with pytest.raises(InputError, match="overwrite counts them in 32 bits"):
        write("disk-delta", [pair], tmp_path / "o", step=1, encoding="overwrite")


@pytest.mark.parametrize(
    ("dialect", "name", "options"),
    [
        ("disk-delta", "o", {}),
        ("disk-delta", "weight_v000003", {"step": 4}),
        ("disk-delta", "o", {"step": 3, "base_step": 1}),
        ("disk-delta", "o", {"step": 0}),
        ("disk-delta", "o", {"step": 1, "encoding": "sum"}),
        ("disk-delta", "o", {"step": 1, "checksum": "sha256"}),
        ("skyrl", "delta-00000003", {"step": 4}),
        ("skyrl", "o", {}),
        ("prime-rl", "o", {}),
        ("prime-rl", "o", {"step": 3, "base_step": 3}),
        ("trl", "o", {}),
        ("trl", "o", {"step": 3, "encoding": "nvcomp_cascaded"}),
    ],
)
def test_options_that_do_not_fit(dialect: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write(dialect, pairs(BASE, TARGET), tmp_path / name, **options)
    assert not [*tmp_path.iterdir()]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Any:
        yield from [*pairs(BASE, TARGET)][:2]
        raise RuntimeError

    for dialect, options in OPTIONS.items():
        with pytest.raises((RuntimeError, KeyError)):
            write(dialect, failing(), tmp_path / "o", **options)
    assert not [*tmp_path.iterdir()]


MAKERS: dict[str, Callable[[Path], Path]] = {
    "disk delta": disk,
    "disk delta, overwrite": lambda at: disk(at, "overwrite"),
    "SkyRL": skyrl,
    "Fireworks": fireworks,
    "Fireworks, zlib": lambda at: naive.write_fireworks(at / "f", BASE, TARGET, "zlib"),
    "prime-rl": prime,
    "prime-rl, compressed": lambda at: naive.write_prime_rl(at / "p", BASE, TARGET, compress=True),
    "TRL": trl,
    "TRL, gaps": lambda at: trl(at, "gap_delta"),
}


@pytest.mark.parametrize("seed", few(range(30), 0))
@pytest.mark.parametrize("what", MAKERS)
def test_damage_is_an_error_or_nothing(what: str, seed: int, tmp_path: Path) -> None:
    """Each file is cut, and has a byte flipped, at random places; a check says so, or the result is right.

    What has no check of the result may give another one.
    """
    path = MAKERS[what](tmp_path)
    random_ = random.Random(seed)
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        whole = file.read_bytes()
        for turn in range(40):
            data = bytearray(whole)
            if turn % 4 == 0:
                del data[random_.randrange(len(data)) :]
            else:
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
            file.write_bytes(data)
            try:
                result = applied(path, BASE, ALLOW)
            except LoratoolError as error:
                assert isinstance(error, InputError | NeedsFlag)
                continue
            if what.startswith(("disk", "SkyRL", "Fireworks")):
                assert all(raw(x) in (raw(BASE[name]), raw(TARGET[name])) for name, x in result.items())
        file.write_bytes(whole)


def test_a_forged_size_takes_no_memory(tmp_path: Path) -> None:
    """A frame that declares 2**60 bytes, one without a size that goes on and on, and a count of 2**32 - 1."""
    huge = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + b"\x03\x00\x00"
    bomb = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(1 << 28))
    paths = []
    for i, data in enumerate((huge, bomb)):
        for j, make in enumerate((disk, lambda at: disk(at, "overwrite"), fireworks)):
            folder = make(tmp_path / f"{i}.{j}")
            edit_tensors(file_of(folder), lambda t, m, data=data: t.update({FEW: as_tensor(data)}))
            paths.append(folder)
    folder = naive.write_prime_rl(tmp_path / "prime", BASE, TARGET, compress=True)
    (folder / "sparse_update_patch.safetensors").write_bytes(huge)
    paths.append(folder)
    paths.append(forged_overwrite(tmp_path / "count", [1], b"1", (1 << 32) - 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        with pytest.raises(InputError):
            applied(path, BASE, ALLOW)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # kB


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Of 128 MB, all changed; written and read in pieces of 1 MB, by each encoding."""
    code = (
        "import sys, resource; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\n"
        "from loratool.files.dtypes import TensorSpec\n"
        "from loratool.patches.dialects.patch import TensorPair\n"
        "from loratool.patches.dialects.table import open_foreign_patch, write_foreign_patch\n"
        "from loratool.patches.dialects.compression import zstd_module\n"
        "zstd_module(); import xxhash, numpy\n"
        "spec, piece = TensorSpec('BF16', (1 << 26,)), bytes(range(256)) * 4096\n"
        "old, new = (lambda: (piece for _ in range(128))), (lambda: (piece[::-1] for _ in range(128)))\n"
        "for dialect, name, options in eval(sys.argv[4]):\n"
        "    out = Path(sys.argv[3]) / name\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    write_foreign_patch(dialect, [TensorPair('x', spec, spec, old, new)], out, **options)\n"
        "    patch = open_foreign_patch(out)\n"
        "    pieces = patch.require({'x': spec}, ['unverified'])['x'].verified(old(), spec)\n"
        "    assert sum(len(each) for each in pieces) == spec.nbytes\n"
        "    print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    cases = [("disk-delta", "a", {"step": 1}), ("disk-delta", "b", {"step": 1, "encoding": "overwrite"})]
    cases += [("prime-rl", "c", {"step": 1}), ("trl", "d", {"step": 1})]
    words = [str(ROOT), str(ROOT / "tests"), str(tmp_path), repr(cases)]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    grown = {line.split()[0]: int(line.split()[1]) for line in result.stdout.splitlines()}
    assert grown.keys() == {"a", "b", "c", "d"} and max(grown.values()) < 60_000, grown


def test_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [disk(tmp_path), naive.write_disk_delta(tmp_path / "b", BASE, TARGET, checksum="blake3")]

    missing: list[str] = []

    def absent(name: str) -> Any:
        if name in missing:
            raise ImportError(name)
        return __import__(name, fromlist=["x"])

    monkeypatch.setattr(compression, "import_module", absent)
    for missing[:] in (["compression.zstd", "backports.zstd"], ["xxhash", "blake3"]):
        for folder in folders:
            with pytest.raises(MachineError, match="needs a package that is not installed") as error:
                applied(folder, BASE)
            assert "[delta]'" in str(error.value.remedy)


def test_a_scratch_file_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    folder = naive.write_prime_rl(tmp_path / "p", BASE, TARGET, compress=True)
    open_ = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with closing(open_foreign_patch(folder)) as patch:
        assert patch.scratch is not None and not patch.files
    if open_:
        assert len(os.listdir("/proc/self/fd")) == open_
    assert not [*(tmp_path / "scratch").iterdir()]
    data = save({"a": torch.ones(2)})
    (folder / "sparse_update_patch.safetensors").write_bytes(zstandard.ZstdCompressor().compress(data + b"1"))
    with pytest.raises(InputError):
        open_foreign_patch(folder)
