"""Hold what a run that goes on does with codes and scattered bytes: it verifies them, and does again what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import weights
from lib.models.coded_models import FRESH, READ, files_of, numbers_of, sized, write_adapter, write_base, write_twins
from lib.models.training_runs import cut, write_dcp

import loratool
from loratool.durable.partial import partial_path
from loratool.files.checkpoint import open_checkpoint
from loratool.streaming import workers
from loratool.streaming.items import FinishedItem, Item, Outcome
from loratool.streaming.workers import Worker


class Died(OSError):
    """The disk is gone."""


@pytest.fixture
def done_again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each item that a former run has finished was done again."""
    found = list[bool]()

    class Watched(Worker):
        def __call__(self, item: Item | FinishedItem) -> Outcome:
            finished = super().__call__(item)
            if isinstance(item, FinishedItem):
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


def stored(folder: Path, name: str) -> tuple[str, ...]:
    """Return the tensors that store a weight, the codes first."""
    with closing(open_checkpoint(folder)) as model:
        return tuple(model.weights[name].tensors)


def chosen(vectors: Iterable[str], fast: str) -> list[Any]:
    return [pytest.param(each, marks=() if each in fast.split() else pytest.mark.slow) for each in vectors]


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
    """Let a run that died go on, which has lost a bit of a tensor."""
    out, whole = folder / "out", folder / "whole"
    count = dies_at_the_end(run, out, whole)
    flip(partial_path(out) / "model.safetensors", lost)
    run(out=out, resume=True)
    assert len(done_again) == count
    assert sum(done_again) == 1
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("vector", chosen(READ, "fp8_blocks bnb_nf4_nested gptq_v1_3bit awq_gemm"))
def test_codes_with_the_scales_of_the_base(vector: str, tmp_path: Path, done_again: list[bool]) -> None:
    base = write_base(vector, tmp_path / "base")
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    run = partial(loratool.merge, base, adapter, quantized="requantize", undo=False, allow=["lossy"])
    check(run, tmp_path, stored(base, next(iter(changes)))[0], done_again)


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("vector", chosen([each.values[0] for each in FRESH], "fp8_blocks"))
def test_codes_and_scales_that_are_encoded_anew(
    vector: str, which: int, tmp_path: Path, done_again: list[bool]
) -> None:
    original, adapter, like = write_twins(vector, tmp_path)
    run = partial(loratool.merge, original, adapter, like=like, undo=False)
    check(run, tmp_path, stored(like, min(numbers_of(like)))[which], done_again)


def test_codes_that_are_restored(tmp_path: Path, done_again: list[bool]) -> None:
    base = write_base("fp8_blocks", tmp_path / "base")
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    loratool.merge(base, adapter, tmp_path / "merged", quantized="requantize")
    check(partial(loratool.unmerge, tmp_path / "merged", adapter), tmp_path, next(iter(changes)), done_again)


def test_bytes_of_a_training_state(tmp_path: Path, done_again: list[bool]) -> None:
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": weights(8, 6, seed=i) for i in range(4)}
    state = {("model", name): tensor for name, tensor in tensors.items()}
    boxes = {path: cut(tensor.shape, {1: [2, 4]}) for path, tensor in state.items()}
    write_dcp(tmp_path / "state" / "pytorch_model_fsdp_0", state, boxes)
    check(partial(loratool.convert_model, tmp_path / "state"), tmp_path, min(tensors), done_again)
