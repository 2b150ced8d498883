"""Kill a merge at each call that names, links or removes a file: the weights on disk keep their undo file.

The kill is a real one, of a fork that ends without another step, so that no handler puts anything in order.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft

import loratool
from loratool.errors import InputError, LoratoolError

CALLS = ("replace", "rename", "unlink", "link", "rmdir", "mkdir")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FIRST, SECOND, NEW = 1.0, 0.5, 0.25  # the weights by which a merge is told


@dataclass(frozen=True)
class Stage:
    """A folder with a base and an adapter; `out` is merged twice, and is about to be replaced."""

    folder: Path
    out: str

    @property
    def base(self) -> Path:
        return self.folder / ("base" if self.out == "out" else "base.safetensors")

    def path(self, name: str) -> Path:
        return self.folder / (name if self.out == "out" else f"{name}.safetensors")

    def merge(self, base: Path, weight: float, out: Path, **options: bool) -> None:
        loratool.merge(base, (self.folder / "adapter", weight), out, force=True, workers=1, **options)

    def unmerge(self, weight: float, merged: Path, out: Path) -> None:
        loratool.unmerge(merged, (self.folder / "adapter", weight), out, force=True, workers=1)


def set_stage(folder: Path, out: str) -> Stage:
    stage = Stage(folder, out)
    tensors = {"x.weight": weights(6, 4, dtype=torch.bfloat16), "y.weight": weights(3, 4, dtype=torch.bfloat16)}
    model = write_model(folder / "base", tensors, {"model_type": "llama"})
    shutil.copy(model / "model.safetensors", folder / "base.safetensors")
    write_peft(folder / "adapter", {"x": factors(6, 4, 2)})
    stage.merge(stage.base, FIRST, stage.path("once"))
    stage.merge(stage.path("once"), SECOND, stage.path("out"))
    return stage


# What replaces the twice merged model -> the weights by which its merges come off, the last first.
RUNS: dict[str, tuple[Callable[[Stage], None], tuple[float, ...]]] = {
    "once merged": (lambda s: s.merge(s.base, NEW, s.path("out")), (NEW,)),
    "without undo": (lambda s: s.merge(s.base, NEW, s.path("out"), undo=False), ()),
    "unmerged": (lambda s: s.unmerge(FIRST, s.path("once"), s.path("out")), ()),
    "merged three times": (lambda s: s.merge(s.path("twice"), NEW, s.path("out")), (NEW, SECOND, FIRST)),
}


def killed(run: Callable[[], object], call: int) -> bool:
    """Return whether a run in a fork is killed when it comes to this call."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        left = [call]

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def do(*arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*arguments, **options)

            return do

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            run()
        except LoratoolError:
            pass
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def same(one: Path, two: Path) -> bool:
    if one.is_file():
        return filecmp.cmp(one, two, shallow=False)
    return all(filecmp.cmp(one / name, two / name, shallow=False) for name in ("config.json", "model.safetensors"))


def check(stage: Stage, new: tuple[float, ...], replacing: bytes) -> None:
    """Check that, whichever weights are there, their merges come off, one after the other, down to the base."""
    there = load_model_of(stage.path("out"))
    merges = new if there == replacing else (SECOND, FIRST)
    merged = stage.path("out")
    for weight, back in zip(merges, ("b1", "b2", "b3"), strict=False):
        stage.unmerge(weight, merged, stage.path(back))
        merged = stage.path(back)
    if merges:
        assert same(stage.base, merged)
        assert not list(stage.folder.glob(f"{merged.stem}.undo*")) and not list(merged.glob("*.undo*"))
    else:
        with pytest.raises(InputError, match="has no undo file"):
            stage.unmerge(NEW, stage.path("out"), stage.path("b1"))
    for left in stage.folder.glob("b[123]*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def load_model_of(path: Path) -> bytes:
    from loratool.files.hub_cache import resolve

    found = resolve(path)
    return b"".join(t.view(torch.uint8).numpy().tobytes() for _, t in sorted(load_model(found).items()))


def fail(stage: Stage) -> None:
    """Run a merge that fails in the middle of its weights."""
    with pytest.raises(LoratoolError, match="infinite"):
        stage.merge(stage.base, 1e42, stage.path("out"))


def campaign(folder: Path, out: str, run: str, again: bool = False) -> int:
    start = folder / "start"
    start.mkdir(parents=True)
    stage = set_stage(start, out)
    stage.merge(stage.path("once"), SECOND, stage.path("twice"))
    replace, new = RUNS[run]
    done = Stage(Path(shutil.copytree(start, folder / "done")), out)
    replace(done)
    replacing, deaths = load_model_of(done.path("out")), 0
    while True:
        one = Stage(Path(shutil.copytree(start, folder / "one")), out)
        dead = killed(lambda one=one: replace(one), deaths)  # type: ignore[misc]
        check(one, new, replacing)
        second = 0
        while again and dead:
            two = Stage(Path(shutil.copytree(one.folder, folder / "two", symlinks=True)), out)
            ended = not killed(lambda two=two: fail(two), second)  # type: ignore[misc]
            check(two, new, replacing)
            shutil.rmtree(two.folder)
            second += 1
            if ended:
                break
        fail(one)
        check(one, new, replacing)
        replace(one)
        assert load_model_of(one.path("out")) == replacing
        check(one, new, replacing)
        assert not list(one.folder.glob("*.loratool-*"))
        shutil.rmtree(one.folder)
        if not dead:
            return deaths
        deaths += 1


def test_the_weights_keep_their_undo_file(tmp_path: Path) -> None:
    assert campaign(tmp_path, "out.safetensors", "once merged") > 4


def test_a_folder_that_was_set_aside(tmp_path: Path) -> None:
    """It exists, under its name."""
    stage = set_stage(tmp_path, "out")
    (tmp_path / "out").rename(tmp_path / "out.loratool-former")
    with pytest.raises(loratool.NeedsFlag, match="exists already, as out.loratool-former"):
        loratool.merge(stage.base, tmp_path / "adapter", tmp_path / "out")
    fail(stage)
    assert (tmp_path / "out" / "loratool.undo").is_file() and not (tmp_path / "out.loratool-former").exists()


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_whatever_replaces_them(
    tmp_path: Path, out: str, run: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whenever the next run, which would fail, is killed in turn; also where nothing can be linked."""
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    print(f"{out}, {run}: {campaign(tmp_path, out, run, again=True)} moments")
