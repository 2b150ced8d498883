"""Hold outputs that appear whole or not at all to what lies where they go, and to steps that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from loratool.durable import disk
from loratool.durable.partial import (
    former_path,
    partial_file,
    partial_folder,
    partial_path,
    scratch_folder,
    scratch_path,
)
from loratool.errors import NeedsFlag, UsageError

Opener = Callable[[Path], AbstractContextManager[Any]]


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("mine")


def make_link(path: Path) -> None:
    path.symlink_to("elsewhere")


IN_THE_WAY: list[tuple[Opener, Callable[[Path], Path], Callable[[Path], None]]] = [
    (partial_file, partial_path, make_folder),
    (partial_file, partial_path, make_link),
    (partial_folder, partial_path, make_file),
    (partial_folder, partial_path, make_link),
    (partial_folder, former_path, make_file),
    (partial_folder, former_path, make_link),
    (scratch_folder, scratch_path, make_file),
    (scratch_folder, scratch_path, make_link),
]


@pytest.mark.parametrize(("opener", "place", "make"), IN_THE_WAY)
def test_what_no_run_has_left_is_in_the_way(
    tmp_path: Path, opener: Opener, place: Callable[[Path], Path], make: Callable[[Path], None]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    taken = place(tmp_path / "out")
    make(taken)
    with pytest.raises(UsageError, match="is in the way") as refused, opener(tmp_path / "out"):
        raise AssertionError("it was opened")
    assert refused.value.culprit == str(taken)
    assert sorted(os.listdir(tmp_path)) == sorted(["elsewhere", taken.name]) and not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("is_there", [True, False])
def test_an_empty_folder_gives_way_to_what_was_set_aside(tmp_path: Path, is_there: bool) -> None:
    out = tmp_path / "out"
    make_folder(former_path(out))
    if is_there:
        out.mkdir()
    with pytest.raises(RuntimeError), partial_folder(out):
        assert (out / "x").read_text() == "mine" and not former_path(out).exists()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"] and (out / "x").read_text() == "mine"


@pytest.mark.parametrize(("opener", "place"), [(partial_folder, partial_path), (scratch_folder, scratch_path)])
def test_what_a_killed_run_has_left_is_removed(tmp_path: Path, opener: Opener, place: Callable[[Path], Path]) -> None:
    left = place(tmp_path / "out")
    make_folder(left)
    make_folder(left / "inner")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    (left / "link").symlink_to("../elsewhere")
    with opener(tmp_path / "out") as folder:
        assert folder == left and not os.listdir(folder)
    assert os.listdir(tmp_path / "elsewhere") == ["x"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_former_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The first sets the former folder aside, the second gives the new one its name."""
    out, calls, real = tmp_path / "out", [0], disk.rename
    make_folder(out)

    def rename(path: Path, new: Path) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(5, "Input/output error")
        real(path, new)

    monkeypatch.setattr(disk, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"), partial_folder(out) as folder:
        (folder / "y").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["x"]


@pytest.mark.parametrize(("opener", "made_by"), [(partial_file, "open_file"), (partial_folder, "make_folder")])
def test_an_output_that_another_process_was_first_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Opener, made_by: str
) -> None:
    out, real = tmp_path / "out", getattr(disk, made_by)

    def other_first(path: Path, *mode: str) -> Any:
        make_file(out)
        return real(path, *mode)

    monkeypatch.setattr(disk, made_by, other_first)
    with pytest.raises(NeedsFlag, match="another loratool has just written it") as refused, opener(out):
        raise AssertionError("it was opened")
    assert refused.value.remedy and "--force" in refused.value.remedy
    assert os.listdir(tmp_path) == ["out"] and out.read_text() == "mine"
