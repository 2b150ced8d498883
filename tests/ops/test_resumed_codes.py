"""Hold what a run that goes on does with codes and scattered bytes: it verifies them, and does again what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_merge_quantized import EACH, files_of, numbers_of, sized, write_adapter, write_base

import loratool
from loratool.files.checkpoint import open_checkpoint
from loratool.files.partial import partial_path
from loratool.streaming import workers
from loratool.streaming.workers import Again, Finished, Item, Worker


class Died(OSError):
    """The disk is gone."""


@pytest.fixture
def done_again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each item that a former run has finished was done again."""
    found = list[bool]()

    class Watched(Worker):
        def __call__(self, item: Item) -> Finished:
            finished = super().__call__(item)
            if isinstance(item, Again):
                found.append(finished.results is not None)
            return finished

    monkeypatch.setattr(workers, "Worker", Watched)
    return found


def flip(file: Path, name: str) -> None:
    """Flip a bit in the middle of a tensor."""
    head = int.from_bytes(file.read_bytes()[:8], "little")
    first, last = json.loads(file.read_bytes()[8 : 8 + head])[name]["data_offsets"]
    with open(file, "r+b") as opened:
        opened.seek(8 + head + (first + last) // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


def codes_of(folder: Path, name: str) -> str:
    with closing(open_checkpoint(folder)) as model:
        return model.weights[name].tensors[0]


def dies_at_the_end(run: Callable[..., Any], out: Path, whole: Path) -> int:
    """Let a run die after its last item, of which the same into `whole` tells the number, which is returned."""
    told, left = list[int](), list[int]()

    def die(done: int, total: int) -> None:
        left.append(done)
        if len(left) == len(told):
            raise Died

    run(out=whole, progress=lambda done, total: told.append(done))
    with pytest.raises(Died):
        run(out=out, progress=die)
    return len(told)


def check(run: Callable[..., Any], folder: Path, lost: str, done_again: list[bool]) -> None:
    """Let a run that died go on; `lost` is a tensor of which it has lost a bit, if any."""
    out, whole = folder / "out", folder / "whole"
    count = dies_at_the_end(run, out, whole)
    if lost:
        flip(partial_path(out) / "model.safetensors", lost)
    run(out=out, resume=True)
    assert len(done_again) == count
    assert sum(done_again) == bool(lost)
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("vector", EACH)
@pytest.mark.parametrize("is_lost", [False, True])
def test_codes_are_verified(vector: str, is_lost: bool, tmp_path: Path, done_again: list[bool]) -> None:
    base = write_base(vector, tmp_path / "base")
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    run = partial(loratool.merge, base, adapter, quantized="requantize", workers=1, undo=False, allow=["lossy"])
    check(run, tmp_path, codes_of(base, next(iter(changes))) if is_lost else "", done_again)


@pytest.mark.parametrize("vector", ["fp8_blocks", "gptq_v1_4bit_act_order", "mxfp4_gpt_oss"])
@pytest.mark.parametrize("lost", ["", "codes", "scales"])
def test_codes_and_scales_of_ones_own_are_verified(
    vector: str, lost: str, tmp_path: Path, done_again: list[bool]
) -> None:
    like = write_base(vector, tmp_path / "like")
    save_file(
        {**{name: load_model(like)[name] for name in PLAIN}, **{n: W.bfloat16() for n, W in numbers_of(like).items()}}
    )
