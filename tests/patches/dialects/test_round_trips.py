"""Hold readers and writers of the dialects against a second implementation, both ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_models import applied, cut, models, pairs, spec_of, without_nan
from lib.oracles import naive_dialects as naive
from lib.oracles.naive_dialects import Model, raw, same

from loratool.patches.dialects.changes import PatchSum
from loratool.patches.dialects.table import DIALECTS, describe_patch, find_dialect, open_foreign_patch
from loratool.patches.dialects.table import write_foreign_patch as write

WIDE = "bfloat16 float16 float32 float64 float8_e4m3fn int8 uint8 int64 int32"
PLAIN = "bfloat16 float16 float32 float64 int8 uint8 int64 int32"


def disk(encoding: str, checksum: str) -> tuple[Any, ...]:
    return (
        "disk-delta",
        WIDE,
        lambda at, *both: naive.write_disk_delta(at / "weight_v000007", *both, 7, encoding, checksum),
        naive.read_disk_delta,
        "weight_v000007",
        {"encoding": encoding, "checksum": checksum},
    )


def trl(encoding: str) -> tuple[Any, ...]:
    def make(at: Path, *both: Model) -> Path:
        return naive.write_trl(at / "step_000007.safetensors", *both, 7, encoding)

    return ("trl", "bfloat16", make, naive.read_trl, "step_000007.safetensors", {"encoding": encoding})


FILES = dict.fromkeys(models(WIDE)[0], "model.safetensors")
# dialect, types, a naive writer, a naive reader, the output's name, options
CASES: dict[str, tuple[Any, ...]] = {
    **{
        f"disk-delta {encoding} {checksum}": disk(encoding, checksum)
        for encoding in ("xor", "overwrite")
        for checksum in ("xxh3-128", "blake3", "adler32")
    },
    "skyrl": (
        "skyrl",
        WIDE,
        lambda at, *both: naive.write_skyrl(at / "delta-00000007", *both, 7),
        naive.read_skyrl,
        "delta-00000007",
        {},
    ),
    "arc_v2": (
        "arc_v2",
        WIDE,
        lambda at, *both: naive.write_fireworks(at / "f", *both, shards=2),
        naive.read_fireworks,
        "f",
        {"files": FILES},
    ),
    "prime-rl": (
        "prime-rl",
        PLAIN,
        lambda at, *both: naive.write_prime_rl(at / "step_7", *both, 7),
        naive.read_prime_rl,
        "step_7",
        {"step": 7},
    ),
    "trl": trl("gap_delta"),
    "trl raw": trl("raw"),
}


def both_models(types: str, dialect: str) -> tuple[Model, Model]:
    return without_nan(models(types)) if dialect == "trl" else models(types)


@pytest.mark.parametrize("case", CASES)
def test_reads_what_another_writes(case: str, tmp_path: Path) -> None:
    dialect, types, make, _, _, _ = CASES[case]
    base, target = both_models(types, dialect)
    path = make(tmp_path, base, target)
    found = find_dialect(path)
    assert found is not None and found.key == dialect
    for size in (1 << 24, 1000, 7):
        assert same(applied(path, base, ["unverified"], size), target)


@pytest.mark.parametrize("case", CASES)
def test_another_reads_what_is_written(case: str, tmp_path: Path) -> None:
    dialect, types, _, read, name, options = CASES[case]
    base, target = both_models(types, dialect)
    for size in (1 << 24, 1000):
        out = tmp_path / str(size) / name
        out.parent.mkdir()
        written = write(dialect, pairs(base, target, size), out, **options)
        assert same(read(out, base), target)
        assert {*written.changed} == {name for name in base if raw(base[name]) != raw(target[name])}
        assert written.nbytes == sum(file.stat().st_size for file in out.parent.rglob("*.safetensors"))
        assert same(applied(out, base, ["unverified"]), target)
        assert [each.name for each in out.parent.iterdir()] == [name]


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] != "arc_v2"])
def test_what_did_not_change_is_left_out(case: str, tmp_path: Path) -> None:
    dialect, types, make, read, name, options = CASES[case]
    base, target = both_models(types, dialect)
    write(dialect, pairs(base, target), tmp_path / name, **options)
    with closing(open_foreign_patch(tmp_path / name)) as patch:
        assert {*patch.changes} == {name for name in base if raw(base[name]) != raw(target[name])}
        assert patch.version == 7 and patch.base_version in (6, None)
        assert all(change.nbytes > 0 for change in patch.changes.values())
    (tmp_path / "empty").mkdir()
    assert not write(dialect, pairs(base, base), tmp_path / "empty" / name, **options).changed
    assert same(read(tmp_path / "empty" / name, base), base)
    assert same(applied(tmp_path / "empty" / name, base), base)
    (tmp_path / "theirs").mkdir()
    assert same(applied(make(tmp_path / "theirs", base, base), base), base)


def test_other_ways_of_writing_a_dialect(tmp_path: Path) -> None:
    base, target = models(PLAIN)
    assert same(applied(naive.write_skyrl(tmp_path / "s", base, target, checksum="sha256"), base), target)
    assert same(applied(naive.write_fireworks(tmp_path / "z", base, target, "zlib"), base, size=999), target)
    assert same(applied(naive.write_prime_rl(tmp_path / "p", base, target, compress=True), base, size=999), target)
    base, target = without_nan(models())
    first = naive.write_trl(tmp_path / "t.safetensors", base, target, encoding="first")
    assert same(applied(first, base, ["unverified"]), target)
    with closing(open_foreign_patch(first)) as patch:
        assert (patch.version, patch.base_version) == (1, 0)


def test_files_of_a_patch_are_taken_for_it(tmp_path: Path) -> None:
    base, target = models()
    for make in (naive.write_disk_delta, naive.write_skyrl, naive.write_prime_rl):
        folder = make(tmp_path / make.__name__, base, target)
        for path in folder.iterdir():
            if path.suffix == ".json":
                assert same(applied(path, base), target)
    folder = naive.write_fireworks(tmp_path / "f", base, target)
    assert same(applied(folder / "model.safetensors", base), target)


def test_one_stream_through_a_chain(tmp_path: Path) -> None:
    """Ten versions by turns of dialects, in one pass over the base."""
    versions = [models("bfloat16 float32", seed=seed) for seed in range(5)]
    names = list(versions[0][0])
    chain = [model for pair in versions for model in pair]
    makers: list[Callable[[Path, Model, Model], Path]] = [
        naive.write_disk_delta,
        lambda *args: naive.write_disk_delta(*args, encoding="overwrite"),
        naive.write_skyrl,
        naive.write_prime_rl,
    ]
    opened = [
        open_foreign_patch(makers[i % 4](tmp_path / str(i), one, two)) for i, (one, two) in enumerate(pairwise(chain))
    ]
    for name in names:
        stream: Any = cut(raw(chain[0][name]), 100)
        for patch in opened:
            if name in patch.changes:
                stream = patch.changes[name].verified(stream, spec_of(chain[0][name]))
        assert b"".join(bytes(piece) for piece in stream) == raw(chain[-1][name])
    for patch in opened:
        patch.close()


@pytest.mark.parametrize("dtype", PLAIN.split())
def test_the_sum_of_prime_rl_is_torchs(dtype: str) -> None:
    """For every pattern of 8 and 16 bits, and random ones of more."""
    kind = getattr(torch, dtype)
    width = torch.empty(0, dtype=kind).element_size()
    bits = torch.arange(1 << 16) if width <= 2 else torch.randint(-(1 << 62), 1 << 62, (4096,))
    numbers = bits.to({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]).view(kind)
    for part in (numbers, *numbers[:300].split(1)):
        total = PatchSum(spec_of(part).dtype)
        places = torch.arange(len(part))
        data = torch.tensor([]).numpy() if not len(part) else part.view(torch.uint8).reshape(-1, width).numpy()
        total.add(places.numpy(), data)
        assert int(str(total)) == torch.hash_tensor(places).item() ^ torch.hash_tensor(part).item()


def test_a_description_of_each(tmp_path: Path) -> None:
    base, target = models()
    folder = naive.write_disk_delta(tmp_path / "d", base, target, checksum="adler32")
    assert describe_patch(folder) == (
        f"a delta of 3 tensors against version 0 (disk-delta: xor, zstd, adler32), no model: "
        f"`loratool apply BASE {folder} -o OUT`"
    )
    assert "of 3 tensors against version 0 (skyrl: xor, zstd, xxh3-128)" in describe_patch(
        naive.write_skyrl(tmp_path / "s", base, target)
    )
    assert "of 5 tensors (arc_v2: xor, zlib, adler32)" in describe_patch(
        naive.write_fireworks(tmp_path / "f", base, target, "zlib")
    )
    assert "of 3 tensors against version 0 (prime-rl: sparse, zstd, a checksum of the patch alone)" in describe_patch(
        naive.write_prime_rl(tmp_path / "p", base, target, compress=True)
    )
    assert "of 3 tensors (trl: sparse, raw, no checksum)" in describe_patch(
        naive.write_trl(tmp_path / "t.safetensors", base, target, encoding="raw")
    )


def test_a_model_is_of_no_dialect(tmp_path: Path) -> None:
    from conftest import FIXTURES

    for path in (FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter", tmp_path, tmp_path / "missing"):
        assert find_dialect(path) is None
    assert [key for key, row in DIALECTS.items() if row.key != key] == []
