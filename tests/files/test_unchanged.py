"""Change or replace an input while it is read: it is refused by its name, and nothing is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

import loratool
from loratool.errors import InputError

VERBS: dict[str, Callable[[Path], Any]] = {
    "merge": lambda at: loratool.merge(at / "base", at / "adapter", at / "out"),
    "merge a file": lambda at: loratool.merge(at / "base", at / "adapter", at / "out.safetensors"),
    "extract": lambda at: loratool.extract(at / "base", at / "tuned", at / "out", rank=2),
    "extract a file": lambda at: loratool.extract(at / "base", at / "tuned", at / "out.safetensors", rank=2),
    "resize": lambda at: loratool.resize(at / "adapter", at / "out", rank=2),
    "combine": lambda at: loratool.combine([at / "adapter", at / "adapter"], at / "out"),
    "convert": lambda at: loratool.convert(at / "adapter", at / "out", to="peft"),
    "convert a checkpoint": lambda at: loratool.convert_model(at / "base", at / "out", to="torch"),
    "init": lambda at: loratool.init(at / "base", at / "out", method="pissa", residual=at / "rest"),
    "unmerge": lambda at: loratool.unmerge(at / "merged", at / "adapter", at / "out"),
    "unmerge --approximate": lambda at: loratool.unmerge(at / "merged", at / "adapter", at / "out", approximate=True),
}
READ = {
    "base": {"merge", "merge a file", "extract", "convert a checkpoint", "init"},
    "tuned": {"extract a file"},
    "adapter": {"merge", "merge a file", "resize", "combine", "convert", "unmerge", "unmerge --approximate"},
    "merged": {"unmerge", "unmerge --approximate"},
}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """Return all inputs, last written to an hour ago."""
    for name in ("base", "adapter", "tuned"):
        shutil.copytree(FIXTURES / "llama" / name, tmp_path / name)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    for path in tmp_path.rglob("*"):
        found = path.stat()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - 3600 * 10**9))
    return tmp_path


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def exchange(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def on_first_write(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    plain, acts = os.pwrite, [act]

    def pwrite(*args: Any) -> int:
        if acts:
            acts.pop()()
        return plain(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)


def weights_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="the moment is told by pwrite")
@pytest.mark.parametrize(
    "read, verb, change",
    [
        *((read, verb, rewrite) for read, verbs in READ.items() for verb in sorted(verbs)),
        ("base", "merge", exchange),
        ("adapter", "merge a file", exchange),
        ("adapter", "resize", exchange),
    ],
)
def test_a_file_that_changes_under_a_verb_is_named(
    stage: Path, monkeypatch: pytest.MonkeyPatch, read: str, verb: str, change: Callable[[Path], None]
) -> None:
    """`exchange` keeps size and mtime, and even the bytes: what is at the path is no longer what was opened."""
    before, place = sorted(stage.iterdir()), weights_of(stage / read)
    on_first_write(monkeypatch, lambda: change(place))
    with pytest.raises(
        InputError,
        match="written to or replaced while it was read|edited since|is not restored exactly|cannot be restored",
    ) as e:
        VERBS[verb](stage)
    assert e.value.culprit == str(place) or (verb == "unmerge" and change is rewrite)  # whose hashes tell the tensor
    assert sorted(stage.iterdir()) == before


def test_a_torch_file_that_changes_is_named(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loratool.convert_model(stage / "base", stage / "pickled", to="torch")
    place = min((stage / "pickled").glob("*.bin"))
    on_first_write(monkeypatch, lambda: rewrite(place))
    with pytest.raises(InputError, match="written to or replaced") as caught:
        loratool.merge(stage / "pickled", stage / "adapter", stage / "out")
    assert caught.value.culprit == str(place) and not (stage / "out").exists()


@pytest.mark.parametrize("read", ["base", "adapter", "merged"])
def test_verify_does_not_judge_what_changes(stage: Path, read: str) -> None:
    place = weights_of(stage / read)

    def progress(done: int, total: int) -> None:
        if done == total:
            rewrite(place)

    with pytest.raises(InputError, match="written to or replaced") as caught:
        loratool.verify(stage / "base", stage / "adapter", stage / "merged", progress=progress)
    assert caught.value.culprit == str(place)


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="the moment is told by pwrite")
@pytest.mark.parametrize("act", ["rewrite", "chmod", "link"])
def test_what_a_run_does_not_see(stage: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """As the guide `scale` says: no file that is written to in place and gets its time back, and no mode or links."""
    place = weights_of(stage / "base")
    status = place.stat()

    def change() -> None:
        if act == "rewrite":
            rewrite(place)
            os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif act == "chmod":
            place.chmod(0o600)
        else:
            os.link(place, stage / "link")

    on_first_write(monkeypatch, change)
    loratool.merge(stage / "base", stage / "adapter", stage / "out")
    assert place.stat().st_mtime_ns == status.st_mtime_ns and (stage / "out").exists()
    if act != "rewrite":
        assert weights_of(stage / "out").read_bytes() == weights_of(stage / "merged").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no open file")
def test_a_file_that_is_removed_is_whole_behind_its_descriptor(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = weights_of(stage / "base")
    on_first_write(monkeypatch, place.unlink)
    loratool.merge(stage / "base", stage / "adapter", stage / "out")
    assert weights_of(stage / "out").read_bytes() == weights_of(stage / "merged").read_bytes()
