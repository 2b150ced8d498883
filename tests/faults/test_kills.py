"""Kill runs at random times, go on with them, kill them again: the bytes are those of an undisturbed run.

The items are made small, so that a run of some kilobytes has as many as one of a terabyte's shard. How many are taken
from a journal is counted, since runs that begin anew would pass too.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import factors, slow, weights, write_model, write_peft
from lib.models.gguf_models import llama_weights, write_llama
from scenarios import Files, files_of
from torch.distributed import FileStore

import loratool
from loratool.durable.journal import Journal
from loratool.durable.partial import partial_path
from loratool.streaming import ranks, workers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SHAPE = (48, 40)
NAMES = [f"model.layers.{n}.mlp.{part}_proj" for n in range(2) for part in ("gate", "up")]


@dataclass(frozen=True)
class Run:
    """A call of the library.

    Attributes:
        call: takes whether to go on.
        out: what it makes.
        forks: whether its workers are processes.
        ranks: how many may share it; at each start so many as are drawn.
        has_tasks: whether its journal has results alone, of nothing that was written.
    """

    call: Callable[[bool], object]
    out: str
    forks: bool = False
    ranks: int = 1
    has_tasks: bool = False


RUNS = {
    "merge": Run(lambda go: loratool.merge("base", "adapter", "out", resume=go, workers=1), "out"),
    "merge in forks": Run(lambda go: loratool.merge("base", "adapter", "out", resume=go, workers=2), "out", True),
    "merge on ranks": Run(lambda go: loratool.merge("base", "adapter", "out", resume=go, workers=1), "out", ranks=3),
    "merge over a file": Run(
        lambda go: loratool.merge("one.safetensors", "adapter", "old.safetensors", force=True, resume=go, workers=1),
        "old.safetensors",
    ),
    "merge without undo": Run(
        lambda go: loratool.merge("base", "adapter", "out", dtype="fp32", undo=False, resume=go, workers=1), "out"
    ),
    "merge of codes": Run(lambda go: loratool.merge("coded", "adapter", "out", resume=go, workers=1), "out"),
    "merge of GGUF": Run(lambda go: loratool.merge("base.gguf", "llama", "out.gguf", resume=go, workers=1), "out.gguf"),
    "unmerge": Run(lambda go: loratool.unmerge("merged", "adapter", "out", resume=go, workers=1), "out"),
    "convert": Run(lambda go: loratool.convert_model("base", "out", dtype="fp16", resume=go, workers=1), "out"),
    "convert on ranks": Run(
        lambda go: loratool.convert_model("one.safetensors", "out.bin", to="torch", resume=go, workers=1),
        "out.bin",
        ranks=3,
    ),
    "convert to torch": Run(
        lambda go: loratool.convert_model("one.safetensors", "out.bin", to="torch", resume=go, workers=1), "out.bin"
    ),
    "extract": Run(lambda go: loratool.extract("base", "merged", "out", rank=2, resume=go), "out", has_tasks=True),
    "extract to a file": Run(
        lambda go: loratool.extract("base", "merged", "out.safetensors", rank=2, resume=go),
        "out.safetensors",
        has_tasks=True,
    ),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make what the runs read, be there, and have items of some hundred bytes."""
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(folder := tmp_path_factory.mktemp("kills"))
    torch.set_num_threads(1)  # a fork has no other threads
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    state = {f"{name}.weight": weights(*SHAPE, seed=seed).bfloat16() for seed, name in enumerate(NAMES)}
    state |= {f"model.layers.{n}.input_layernorm.weight": weights(300, seed=n).bfloat16() for n in range(2)}
    state |= {"model.embed_tokens.weight": weights(64, 40).bfloat16()}
    write_model(Path("base"), state, config, shards=3)
    shutil.copy(write_model(Path("single"), state, config) / "model.safetensors", "one.safetensors")
    write_peft(Path("adapter"), {name: factors(*SHAPE, 4, seed) for seed, name in enumerate(NAMES)})
    coded = dict(state)
    for name in NAMES:
        coded[f"{name}.weight"] = weights(*SHAPE).to(torch.float8_e4m3fn)
        coded[f"{name}.weight_scale_inv"] = torch.full((1, 1), 0.5)
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_model(Path("coded"), coded, {**config, "quantization_config": block}, shards=3)
    write_llama(Path("base.gguf"), llama_weights(), dtype="BF16")
    of_llama = {name.removesuffix(".weight"): W for name, W in llama_weights().items() if "_proj" in name}
    write_peft(Path("llama"), {name: factors(*W.shape, 2, 1) for name, W in of_llama.items()})
    with pytest.MonkeyPatch.context() as patch:
        for place, value in {"ROWS_ITEM": 200, "MIN_ROWS": 1, "BATCH": 1, "COPY_ITEM": 200}.items():
            patch.setattr(f"loratool.streaming.rewrite.{place}", value)
        patch.setattr("loratool.undo.checks.RECORD", 100)
        loratool.merge("base", "adapter", "merged", workers=1)
        loratool.merge("one.safetensors", ("adapter", 0.5), "old.safetensors", workers=1)
        yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


class Child:
    """A run in a process of its own.

    Args:
        taken: a file, to which it writes a byte for each item that it takes from a journal.
        rank, count: of the ranks that share it, whose store is a file.
    """

    def __init__(self, run: Run, resume: bool, taken: int, rank: int = 0, count: int = 1, store: str = "") -> None:
        self._opened, told = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(told)
            return
        try:
            opened, results, is_written = Journal.open, Journal.results, workers.Worker._is_written

            def tell(journal: Journal) -> None:
                os.write(told, b"x")
                opened(journal)

            def counted_task(journal: Journal, item: int) -> Any:
                os.write(taken, b"x")
                return results(journal, item)

            def counted_item(worker: workers.Worker, again: workers.FinishedItem) -> bool:
                found = is_written(worker, again)
                os.write(taken, b"x" * found)
                return found

            Journal.open, workers.Worker._is_written = tell, counted_item  # type: ignore[method-assign]
            if run.has_tasks:
                Journal.results = counted_task  # type: ignore[method-assign]
            workers.WORTH_A_FORK = 0 if run.forks else 1 << 60
            if count > 1:
                shared = ranks._SharedStore(FileStore(store, count))
                start = ranks.rendezvous(shared, rank, count, lambda _: None)
                ranks._job = ranks.Job(rank, count, rank, count, start, store=shared)
            with suppress(ranks.RankDone):
                run.call(resume)
            os._exit(0)
        finally:
            os._exit(1)

    def opened(self) -> None:
        """Wait until it has opened its journal."""
        os.read(self._opened, 1)

    def end(self) -> int:
        """Wait for its end, and return its code."""
        os.close(self._opened)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def started(run: Run, resume: bool, taken: int, count: int) -> list[Child]:
    """Start a run on so many ranks, with a store of their own."""
    store = tempfile.mktemp(prefix="ranks-", dir=Path.cwd().parent)
    return [Child(run, resume, taken, rank, count, store) for rank in range(count)]


def killed_and_gone_on(run: Run, files: Files, seconds: float, dice: Random, taken: int) -> int:
    """Go on with a run until it ends, each time killed at a random time but the last; return how often it was."""
    old = {name: data for name, data in files_of(Path.cwd()).items() if name.startswith(run.out)}
    new = {name: data for name, data in files.items() if name.startswith(run.out)}
    kills = 0
    while True:
        children = started(run, kills > 0, taken, dice.randint(1, run.ranks))
        if dice.random() < 0.8:
            children[0].opened()
        time.sleep(dice.random() * 1.2 * seconds)
        for child in dice.sample(children, len(children)):  # torchrun ends all when one has died
            child.kill()
            time.sleep(dice.choice((0, 0.02)))
        code, *_ = [child.end() for child in children]
        there = files_of(Path.cwd())
        assert code in (0, -signal.SIGKILL), "a run has failed"
        if code == 0:
            assert there == files, "the bytes are others"
            return kills
        kills += 1
        now = {name: data for name, data in there.items() if name.startswith(run.out) and ".loratool-" not in name}
        assert now in (old, new), "a mixture has the output's name"
        if now == new and old != new and not partial_path(Path(run.out)).exists():  # killed when it had ended
            return kills


def clear(run: Run) -> None:
    """Remove what a run has left or made."""
    for path in Path.cwd().glob(f"{Path(run.out).stem}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def campaign(run: Run, number: int, seed: int) -> None:
    """Kill a run and go on with it, until so many kills."""
    before = files_of(Path.cwd())
    old = [Path(name) for name in before if name.startswith(Path(run.out).stem)]
    kept = {path: path.read_bytes() for path in old}
    child = Child(run, False, -1)
    child.opened()
    began = time.monotonic()
    assert child.end() == 0
    seconds, files = time.monotonic() - began, files_of(Path.cwd())
    dice, kills = Random(seed), 0
    with tempfile.TemporaryFile() as count:
        while kills < number:
            clear(run)
            for path, data in kept.items():
                path.write_bytes(data)
            kills += killed_and_gone_on(run, files, seconds, dice, count.fileno())
        items = os.fstat(count.fileno()).st_size
    clear(run)
    print(f"{kills} kills, {items} items taken from a journal, {seconds:.2f} s a run")
    assert items > kills, "no run went on"


@pytest.mark.parametrize("name", [slow("merge"), "merge over a file", slow("unmerge"), slow("convert")])
def test_some_kills(stage: Path, name: str) -> None:
    campaign(RUNS[name], 5, 28)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_many_kills(stage: Path, name: str) -> None:
    campaign(RUNS[name], 200, 28)
