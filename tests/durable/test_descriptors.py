"""Merge, combine and compare more files than a process may have open, to the same bytes, and leave none open."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.durable import fileio
from loratool.durable.descriptors import RECENT, SHARE, kept_open
from loratool.errors import InputError
from loratool.streaming import parallel, workers

resource = pytest.importorskip("resource", reason="Windows sets no limit of a process from within")
DESCRIPTORS, FREE = 40, 30
MODULE = "model.layers.{}.self_attn.q_proj"


@pytest.fixture
def few() -> Iterator[None]:
    """Leave the process fewer descriptors than files are opened, whatever the tests before this one have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken_now = set(map(int, os.listdir("/dev/fd")))
    free = [number for number in range(soft) if number not in taken_now][:FREE]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1] + 1, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def taken() -> int:
    return len(os.listdir("/dev/fd"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".undo")}


def write_base(folder: Path, shards: int) -> Path:
    return write_model(
        folder, {f"{MODULE.format(i)}.weight": weights(6, 4, seed=i) for i in range(shards)}, shards=shards
    )


def write_adapters(folder: Path, count: int, layers: int = 1) -> list[Path]:
    layer = [MODULE.format(i) for i in range(layers)]
    return [write_peft(folder / str(k), {module: factors(6, 4, 1, seed=k) for module in layer}) for k in range(count)]


def test_many_adapters(tmp_path: Path, few: None) -> None:
    base, adapters = write_base(tmp_path / "base", 1), write_adapters(tmp_path, DESCRIPTORS + 6)
    before = taken()
    loratool.merge(base, adapters, tmp_path / "few")
    loratool.combine(adapters, tmp_path / "few-combined")
    assert taken() <= before + RECENT
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loratool.merge(base, adapters, tmp_path / "many")
    assert files_of(tmp_path / "few") == files_of(tmp_path / "many")


@pytest.mark.parametrize("forked", [False, True])
def test_many_shards(tmp_path: Path, few: None, forked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORTH_A_FORK", 0 if forked else 1 << 60)
    monkeypatch.setattr(parallel, "worker_count", lambda: 2)
    base, (adapter,) = write_base(tmp_path / "base", DESCRIPTORS + 6), write_adapters(tmp_path, 1, 3)
    loratool.merge(base, adapter, tmp_path / "merged")
    loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert loratool.diff(base, tmp_path / "back").same
    assert files_of(tmp_path / "back") == files_of(base)


def test_without_reads_and_writes_at_an_offset(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "pwrite", "copy_file_range"):
        monkeypatch.delattr(os, name, raising=False)
    base, (adapter,) = write_base(tmp_path / "base", DESCRIPTORS + 6), write_adapters(tmp_path, 1, 3)
    loratool.merge(base, adapter, tmp_path / "merged")
    loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.fixture
def beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no file open."""
    monkeypatch.setattr("loratool.durable.descriptors._limit", lambda: SHARE)


def opened(path: Path) -> BinaryIO:
    return kept_open(fileio.open_for_reading(path), lambda: fileio.open_for_reading(path))


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path, beyond: None) -> None:
    for name in ("a", "b", "c", "new"):
        (tmp_path / name).write_bytes(name.encode() * 4)
    files = [opened(tmp_path / name) for name in ("a", "b", "c")]
    buffer = memoryview(bytearray(4))
    for file, text in zip(files * 2, (b"aaaa", b"bbbb", b"cccc") * 2, strict=True):
        fileio.read_into(file, buffer, 0)
        assert buffer == text
    os.replace(tmp_path / "new", tmp_path / "a")
    with pytest.raises(InputError, match="replaced while it was read") as refused:
        fileio.read_into(files[0], buffer, 0)
    assert refused.value.culprit == str(tmp_path / "a")
    for file in files:
        file.close()


def test_threads_have_descriptors_of_their_own_and_leave_none(tmp_path: Path, beyond: None) -> None:
    (tmp_path / "a").write_bytes(b"aaaa")
    before, seen = taken(), []
    file = opened(tmp_path / "a")

    def look() -> None:
        seen.append(file.fileno())

    look()
    for _ in range(20):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen[0] not in seen[1:] and taken() == before + 1
    file.close()
    assert taken() == before
    with pytest.raises(ValueError, match="closed file"):
        file.fileno()


def test_a_system_that_tells_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows, whose C library has 512: files are kept open up to the same share of these."""
    monkeypatch.setitem(sys.modules, "resource", None)
    path = tmp_path / "x"
    path.write_bytes(b"0123")
    with ExitStack() as stack:
        opened = [stack.enter_context(open(path, "rb", buffering=0)) for _ in range(512 // SHARE)]
        kept = [stack.enter_context(kept_open(file, partial(open, path, "rb", buffering=0))) for file in opened]
        beyond = [file for file, made in zip(kept, opened, strict=True) if file is not made]
        assert beyond and all(made.fileno() < 512 // SHARE for made in opened if not made.closed)
        assert os.pread(beyond[0].fileno(), 4, 0) == b"0123"
