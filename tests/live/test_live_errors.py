"""Hold that an error at any block leaves all bits as they were, and that what changed since is refused."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, factors, few, load_model, weights, write_model, write_peft
from lib.models.peft_models import llama, wrap
from torch import Tensor, nn

import loratool
from loratool.errors import InputError, LoratoolError, UsageError
from loratool.live.blocks import Mover
from loratool.live.strided import StridedMemory
from loratool.numerics.merge import RowMerge
from loratool.undo.records import Restorer

NAMES = [f"layers.{i}" for i in range(6)]
SHAPES = {name: (24 + i, 16) for i, name in enumerate(NAMES)}  # each its own, or they would be one block
MERGED, RESTORED = (RowMerge, "apply_each"), (Restorer, "check")


class Broken(Exception):
    """An error that is not ours."""


def state(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {f"{n}.weight": weights(*shape, seed=i).to(dtype) for i, (n, shape) in enumerate(SHAPES.items())}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(bits(found[name]), bits(x)) for name, x in wanted.items())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft(
        tmp_path / "adapter", {n: factors(*shape, 4, seed=i) for i, (n, shape) in enumerate(SHAPES.items())}
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """An adapter of some of the same modules."""
    return write_peft(tmp_path / "other", {n: factors(*SHAPES[n], 2, seed=9 + i) for i, n in enumerate(NAMES[1:4])})


@contextmanager
def failing(at: int, owner: type, method: str, how: Callable[[], None]) -> Iterator[list[int]]:
    """Have the call of this number fail; all others go on."""
    calls, real, lock = [0], getattr(owner, method), threading.Lock()

    def counted(self: Any, *args: Any, **keywords: Any) -> Any:
        with lock:
            calls[0] += 1
            number = calls[0]
        if number == at:
            how()
        return real(self, *args, **keywords)

    setattr(owner, method, counted)
    try:
        yield calls
    finally:
        setattr(owner, method, real)


def broken() -> None:
    raise Broken


def interrupted() -> None:
    """As Ctrl-C: the main thread learns of it, while this one goes on."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


WAYS: dict[str, tuple[Callable[[], None], type[BaseException]]] = {
    "error": (broken, Broken),
    "Ctrl-C": (interrupted, KeyboardInterrupt),
}


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("at", few(range(1, 7), 1, 4, 6))
@pytest.mark.parametrize("way", WAYS)
def test_a_merge_that_fails_at_any_block(way: str, at: int, workers: int, adapter: Path) -> None:
    tensors, live = state(), None
    before, (how, raised) = copies(tensors), WAYS[way]
    with failing(at, *MERGED, how), pytest.raises(raised):
        live = loratool.live.merge(tensors, adapter, workers=workers)
        time.sleep(10)  # the interrupt came with the last block
    if live:
        live.unmerge()
    assert same(tensors, before)
    loratool.live.merge(tensors, adapter).unmerge()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merge", "swap", "unmerge"])
def test_interrupts_at_any_time_leave_one_state_or_the_other(kind: str, tmp_path: Path) -> None:
    """And a handle that leads back, wherever in the call they come."""
    shapes = {f"layers.{i}": (200 + i, 160) for i in range(40)}
    tensors = {f"{n}.weight": weights(*shape, seed=i).bfloat16() for i, (n, shape) in enumerate(shapes.items())}
    one, two = (
        write_peft(tmp_path / str(rank), {n: factors(*shape, rank, seed=rank) for n, shape in shapes.items()})
        for rank in (4, 3)
    )
    before, states, live = copies(tensors), list[dict[str, Tensor]](), loratool.live.merge(tensors, one)
    states += [before, copies(tensors)]
    live.swap(two)
    states.append(copies(tensors))
    live.unmerge()
    choose, found = random.Random(7), set[int]()
    for _ in range(60):
        kept = None if kind == "merge" else loratool.live.merge(tensors, one, workers=3)
        timer = threading.Timer(choose.random() * 0.08, interrupted)
        try:
            timer.start()
            if kept is None:
                kept = loratool.live.merge(tensors, one, workers=3)
            elif kind == "swap":
                kept.swap(two)
            else:
                kept.unmerge()
            time.sleep(10)
        except KeyboardInterrupt:
            pass
        timer.join()
        found |= {i for i, wanted in enumerate(states) if same(tensors, wanted)} or {-1}
        if kept and kept.is_merged:
            kept.unmerge()
        assert same(tensors, before)
    assert found <= ({1, 2} if kind == "swap" else {0, 1})


@pytest.mark.parametrize("at", few(range(1, 7), 1, 4, 6))
def test_an_unmerge_that_fails_at_any_block_stays_merged(at: int, adapter: Path) -> None:
    tensors = state()
    before, live = copies(tensors), loratool.live.merge(tensors, adapter)
    merged = copies(tensors)
    with failing(at, *RESTORED, broken), pytest.raises(Broken):
        live.unmerge()
    assert same(tensors, merged) and live.is_merged
    live.unmerge()
    assert same(tensors, before)


@pytest.mark.parametrize("where", [MERGED, RESTORED], ids=["merged", "restored"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_swap_that_fails_at_any_block_keeps_the_former(
    at: int, where: tuple[type, str], adapter: Path, other: Path
) -> None:
    tensors = state()
    before, live = copies(tensors), loratool.live.merge(tensors, adapter)
    merged, report = copies(tensors), live.report
    with failing(at, *where, broken), pytest.raises(Broken):
        live.swap(other)
    assert same(tensors, merged) and live.report is report
    live.swap(other)
    live.unmerge()
    assert same(tensors, before)


@pytest.mark.parametrize("at", [1, 2])
def test_a_swap_whose_plan_needs_the_base_fails_in_its_second_half(at: int, tmp_path: Path) -> None:
    """An adapter that brings an embedding is compared with the base's, so the former one is taken out first."""
    cls, before = type(llama()), llama().bfloat16().state_dict()
    for name, kind in (("plain", ["q_proj"]), ("words", ["q_proj", "embed_tokens"])):
        model = cls(llama().config).bfloat16()
        model.load_state_dict(before)
        wrap(model, target_modules=kind).save_pretrained(tmp_path / name, save_embedding_layers=True)
    model = cls(llama().config).bfloat16()
    model.load_state_dict(before)
    live = loratool.live.merge(model, tmp_path / "plain")
    merged, moves = copies(model.state_dict()), list[Any]()
    with failing(at, *MERGED, broken), pytest.raises(Broken), pytest.MonkeyPatch.context() as patched:
        real = Mover.move
        patched.setattr(Mover, "move", lambda self, old, new: (moves.append((old, new)), real(self, old, new)))
        live.swap(tmp_path / "words")
    assert [(bool(old), bool(new)) for old, new in moves] == [(True, False), (False, True), (False, True)]
    assert same(model.state_dict(), merged)
    live.unmerge()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_small_tensors_of_one_shape_in_batches(at: int, tmp_path: Path) -> None:
    """A batch is read, merged and then written tensor by tensor; the second of two fails, or one overflows."""
    names = [f"layers.{i}" for i in range(300)]
    tensors = {f"{n}.weight": weights(32, 30, seed=i).half() for i, n in enumerate(names)}
    pairs = {n: factors(32, 30, 4, seed=i) for i, n in enumerate(names)}
    small = write_peft(tmp_path / "small", pairs)
    large = write_peft(tmp_path / "large", pairs | {names[-1]: (pairs[names[-1]][0] * 1e4, pairs[names[-1]][1] * 1e5)})
    write_model(tmp_path / "base", tensors, {})
    loratool.merge(tmp_path / "base", small, tmp_path / "merged")
    before = copies(tensors)
    with failing(at, *MERGED, broken) as calls:
        if at == 3:
            with pytest.raises(InputError, match=r"^layers\.299\.weight: .* become infinite"):
                loratool.live.merge(tensors, large)
        else:
            with pytest.raises(Broken):
                loratool.live.merge(tensors, small)
    assert calls == [2] if at > 1 else calls[0] < 3
    assert same(tensors, before)
    with failing(200, StridedMemory, "write", broken), pytest.raises(Broken):
        loratool.live.merge(tensors, small)
    assert same(tensors, before)
    with loratool.live.merged(tensors, small):
        assert same(tensors, load_model(tmp_path / "merged"))
    assert same(tensors, before)


def test_a_report_that_fails(adapter: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it there is no handle, and so no way back."""
    tensors = state()
    before, live = copies(tensors), loratool.live.merge(tensors, other)
    merged = copies(tensors)
    monkeypatch.setattr("loratool.live.handle._report", lambda *args: broken())
    for call in (lambda: live.swap(adapter), lambda: loratool.live.merge(tensors, adapter)):
        with pytest.raises(Broken):
            call()
        assert same(tensors, merged)
    live.unmerge()
    assert same(tensors, before)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_write_that_fails(at: int, adapter: Path) -> None:
    tensors = state()
    before = copies(tensors)
    with failing(at, StridedMemory, "write", broken), pytest.raises(Broken):
        loratool.live.merge(tensors, adapter)
    assert same(tensors, before)


def test_an_adapter_of_another_base_and_one_that_overflows(adapter: Path, tmp_path: Path) -> None:
    tensors = state(torch.float16)
    before = copies(tensors)
    (A, B), (C, D), (E, F) = (factors(*SHAPES[n], 4) for n in (NAMES[0], NAMES[5], NAMES[1]))
    large = write_peft(tmp_path / "large", {NAMES[0]: (A, B), NAMES[5]: (C * 1e4, D * 1e5)})
    wrong = write_peft(tmp_path / "wrong", {"layers.0": factors(30, 16, 4)})
    damaged = write_peft(tmp_path / "damaged", {NAMES[0]: (A, B), NAMES[1]: (E * float("nan"), F)})
    for folder, says in ((large, r"become infinite in F16\n"), (wrong, "layers.0"), (damaged, "nan")):
        with pytest.raises(InputError, match=says):
            loratool.live.merge(tensors, folder)
        assert same(tensors, before)
        live = loratool.live.merge(tensors, adapter)
        merged = copies(tensors)
        with pytest.raises(InputError, match=says):
            live.swap(folder)
        assert same(tensors, merged)
        live.unmerge()
        assert same(tensors, before)


@pytest.mark.parametrize("check", ["sha256", "sum"])
def test_one_weight_that_moved_by_one_step_since(check: Any, adapter: Path, other: Path) -> None:
    tensors = state()
    live = loratool.live.merge(tensors, adapter, check=check)
    merged = copies(tensors)
    tensors["layers.2.weight"].view(torch.int16)[3, 4] += 1
    edited = copies(tensors)
    for call in (live.unmerge, lambda: live.swap(other)):
        with pytest.raises(InputError, match=r"^layers\.2\.weight: was changed since it was merged\n."):
            call()
        assert same(tensors, edited)
    tensors["layers.2.weight"].view(torch.int16)[3, 4] -= 1
    assert same(tensors, merged)
    live.unmerge()
    assert same(tensors, state())


def test_two_weights_that_were_exchanged_since(adapter: Path) -> None:
    """The sum of W' does not see it; the hash of W does, and what was done is undone."""
    tensors = state()
    live = loratool.live.merge(tensors, adapter)
    words = tensors["layers.5.weight"].view(torch.int64)
    assert words[0, 0] != words[1, 0]
    words[:2, 0] = words[:2, 0].flip(0)
    edited = copies(tensors)
    with pytest.raises(InputError, match=r"layers\.5\.weight: "):
        live.unmerge()
    assert same(tensors, edited)


def test_a_module_that_was_moved_or_cast_since(adapter: Path) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(16, rows, dtype=torch.bfloat16) for rows, _ in SHAPES.values())
    live = loratool.live.merge(model, adapter)
    with torch.no_grad():
        kept = [layer.weight.data for layer in model.layers]
        model.half()
    with pytest.raises(InputError, match="has other tensors than when it was merged"):
        live.unmerge()
    for layer, data in zip(model.layers, kept, strict=True):
        layer.weight.data = data
        layer.bias.data = layer.bias.data.bfloat16()
    with pytest.raises(InputError, match="has other tensors"):
        live.unmerge()  # the biases are others


def test_merges_of_one_tensor_are_a_stack(adapter: Path, other: Path, tmp_path: Path) -> None:
    tensors = state()
    apart = write_peft(tmp_path / "apart", {NAMES[5]: factors(*SHAPES[NAMES[5]], 2)})
    before, first = copies(tensors), loratool.live.merge(tensors, other)
    second, third = loratool.live.merge(tensors, adapter), loratool.live.merge(tensors, apart)
    top = copies(tensors)
    for call in (first.unmerge, lambda: first.swap(apart)):
        with pytest.raises(InputError, match=r"^layers\.1\.weight: .*adapter was merged into it later\nunmerge that"):
            call()
    with pytest.raises(InputError, match=r"^layers\.5\.weight: .*apart was merged into it later"):
        second.unmerge()
    assert same(tensors, top)
    third.unmerge()
    second.swap(apart)  # which has no tensor of the first
    first.unmerge()
    second.unmerge()
    assert same(tensors, before)
    for call in (first.unmerge, lambda: first.swap(apart)):
        with pytest.raises(UsageError, match="is not merged any more"):
            call()


def test_a_merge_whose_handle_is_lost_cannot_be_undone_under(adapter: Path, other: Path) -> None:
    """What nobody can take out any more stays, and what is below it is refused."""
    tensors = state()
    first = loratool.live.merge(tensors, other)
    loratool.live.merge(tensors, adapter)
    gc.collect()
    with pytest.raises(InputError, match="was changed since it was merged, and 2 tensors more"):
        first.unmerge()


def test_a_block_of_code_unmerges_after_an_error(adapter: Path, other: Path) -> None:
    tensors = state()
    before = copies(tensors)
    with pytest.raises(Broken), loratool.live.merged(tensors, adapter) as live:
        live.swap(other)
        raise Broken
    assert same(tensors, before) and not live.is_merged
    with loratool.live.merged(tensors, adapter) as live:
        live.unmerge()
    assert same(tensors, before)


def test_an_adapter_that_is_written_again_meanwhile(adapter: Path) -> None:
    """A trainer saves each step to the same place."""
    tensors = state()
    before, live = copies(tensors), loratool.live.merge(tensors, adapter)
    for file in adapter.iterdir():
        file.write_bytes(b"")
    live.unmerge()
    assert same(tensors, before)


def test_threads_that_merge_at_once_wait_for_each_other(adapter: Path, other: Path) -> None:
    tensors, failed = state(), list[LoratoolError]()
    before = copies(tensors)

    def cycle(folder: Path) -> None:
        try:
            for _ in range(5):
                loratool.live.merge(models[folder], folder, workers=2).unmerge()
        except LoratoolError as error:
            failed.append(error)

    models = {adapter: tensors, other: copies(tensors)}
    threads = [threading.Thread(target=cycle, args=(folder,)) for folder in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and all(same(model, before) for model in models.values())
