"""Measure speed and memory of merge as whole processes, both sides in one run: pytest -m slow -s tests/benchmarks

The bounds are the promises: a fraction of peft's time, close to a file copy, memory that does not grow.
"""

from __future__ import annotations

import filecmp
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from models import adapted, make, make_adapter, shapes

COMMAND = [sys.executable, "-c", "from loratool.cli import main; main()"]
MERGE = [*COMMAND, "merge", "-q", "--no-undo"]
UNDOABLE = [*COMMAND, "merge", "-q"]
RSS_LIMIT = 450  # MB, everything in


def measure(command: list[object]) -> float:
    """Return the seconds of a process, a `sync` of its output included, but none of what the disk had to do before."""
    os.sync()  # a deletion of gigabytes goes on for seconds
    start = time.perf_counter()
    subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    return time.perf_counter() - start


def peak(command: list[object]) -> float:
    """Return the peak memory in MB of a process and its workers together, sampled five times a second.

    It needs a run of its own, as looking takes time.
    """
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0
    return most / 1024


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(pid: int) -> int:
    """Return the kB of a process and its children, shared pages once."""
    total = 0
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += memory(int(child))
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        pass  # it has just ended
    return total


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("models")
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
def test_small_model_against_peft(models: Path) -> None:
    make(models / "small", "small")
    base, adapter = models / "small" / "base", models / "small" / "adapter"
    ours, theirs = [], []
    rival = [sys.executable, Path(__file__).parent / "peft_merge.py"]
    for _ in range(3):
        ours.append(measure([*MERGE, base, adapter, "-o", fresh(models / "ours")]))
        theirs.append(measure([*rival, base, adapter, fresh(models / "theirs")]))
    mine, yours = statistics.median(ours), statistics.median(theirs)
    rss = peak([*MERGE, base, adapter, "-o", fresh(models / "ours")])
    print(f"\n0.6 GB: loratool {mine:.2f} s, {rss:.0f} MB; peft {yours:.2f} s")
    print(f"ratio {mine / yours:.2f} (at most 0.35)")
    assert mine <= 0.35 * yours and rss <= RSS_LIMIT


@pytest.mark.slow
def test_undo_against_peft(models: Path) -> None:
    """Merge with its undo file and hashes, and the way back, which ends in the base's very bytes."""
    if not (models / "small").exists():
        make(models / "small", "small")
    base, adapter = models / "small" / "base", models / "small" / "adapter"
    ours, back, theirs = [], [], []
    rival = [sys.executable, Path(__file__).parent / "peft_merge.py"]
    for _ in range(3):
        ours.append(measure([*UNDOABLE, base, adapter, "-o", fresh(models / "ours")]))
        back.append(measure([*COMMAND, "unmerge", "-q", models / "ours", adapter, "-o", fresh(models / "back")]))
        theirs.append(measure([*rival, base, adapter, fresh(models / "theirs")]))
    mine, restored, yours = (statistics.median(runs) for runs in (ours, back, theirs))
    rss = max(
        peak([*UNDOABLE, base, adapter, "-o", fresh(models / "ours")]),
        peak([*COMMAND, "unmerge", "-q", models / "ours", adapter, "-o", fresh(models / "back")]),
    )
    share = (models / "ours" / "loratool.undo").stat().st_size / sum(f.stat().st_size for f in base.iterdir())
    print(f"\n0.6 GB with undo: loratool {mine:.2f} s, unmerge {restored:.2f} s, {rss:.0f} MB; peft {yours:.2f} s")
    print(f"ratio {mine / yours:.2f} (at most 0.4); the undo file is {share:.2%} of the base")
    for file in base.iterdir():
        assert filecmp.cmp(file, models / "back" / file.name, shallow=False)
    assert mine <= 0.4 * yours and rss <= RSS_LIMIT


@pytest.mark.slow
def test_large_undo_against_a_copy(models: Path) -> None:
    if not (models / "large").exists():
        make(models / "large", "large")
    base, adapter = models / "large" / "base", models / "large" / "adapter"
    weights = sum(out * inp for out, inp in adapted("large").values())
    ours, copies, spent = [], [], []
    measure(["cp", "-r", base, fresh(models / "warm")])
    for _ in range(3):
        copies.append(measure(["cp", "-r", base, fresh(models / "warm")]))
        fresh(models / "warm")
        before = cpu_of_children()
        ours.append(measure([*UNDOABLE, base, adapter, "-o", fresh(models / "ours")]))
        spent.append(cpu_of_children() - before)
    rss = peak([*UNDOABLE, base, adapter, "-o", fresh(models / "ours")])
    fresh(models / "ours")
    compute = 9.5e-9 * weights / len(os.sched_getaffinity(0))
    each = (min(spent) - 2) / sum(math.prod(shape) for _, shape in shapes("large")) * 1e9
    rate = sum(file.stat().st_size for file in base.iterdir()) / min(copies) / 1e9
    print(f"\nCPU: {min(spent):.1f} s, {each:.1f} ns a weight but for 2 s (at most 10); cp -r: {rate:.1f} GB/s")
    assert each <= 10
    mine, copy = statistics.median(ours), statistics.median(copies)
    print(
        f"\n6.2 GB with undo: loratool {mine:.2f} s, {rss:.0f} MB; cp -r {copy:.2f} s; 9.5 ns a weight: {compute:.2f} s"
    )
    print(f"ratio {mine / max(copy, compute):.2f} (at most 1.3)")
    assert mine <= 1.3 * max(copy, compute) and rss <= RSS_LIMIT


@pytest.mark.slow
def test_embedding_and_head_against_peft(models: Path) -> None:
    if not (models / "small").exists():
        make(models / "small", "small")
    base, adapter = models / "small" / "base", models / "small" / "vocabulary"
    make_adapter(adapter, "small", vocabulary=True)
    ours, theirs = [], []
    rival = [sys.executable, Path(__file__).parent / "peft_merge.py"]
    for _ in range(3):
        ours.append(measure([*MERGE, base, adapter, "-o", fresh(models / "ours")]))
        theirs.append(measure([*rival, base, adapter, fresh(models / "theirs")]))
    mine, yours = statistics.median(ours), statistics.median(theirs)
    rss = peak([*MERGE, base, adapter, "-o", fresh(models / "ours")])
    print(f"\nembedding and head too: loratool {mine:.2f} s, {rss:.0f} MB; peft {yours:.2f} s")
    print(f"ratio {mine / yours:.2f} (at most 0.35)")
    assert mine <= 0.35 * yours and rss <= RSS_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [False, True], ids=["linear", "vocabulary"])
def test_dora_against_plain_lora(models: Path, vocabulary: bool) -> None:
    if not (models / "small").exists():
        make(models / "small", "small")
    for dora in (False, True):
        make_adapter(models / f"dora-{dora}-{vocabulary}", "small", dora=dora, vocabulary=vocabulary)
    runs: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for dora, measured in runs.items():
            adapter = models / f"dora-{dora}-{vocabulary}"
            measured.append(measure([*MERGE, models / "small" / "base", adapter, "-o", fresh(models / "ours")]))
    plain, dora = (statistics.median(measured) for measured in runs.values())
    rss = peak([*MERGE, models / "small" / "base", models / f"dora-True-{vocabulary}", "-o", fresh(models / "ours")])
    print(f"\nDoRA {dora:.2f} s, LoRA {plain:.2f} s, ratio {dora / plain:.2f} (at most 1.9); {rss:.0f} MB")
    assert dora <= 1.9 * plain and rss <= RSS_LIMIT


@pytest.mark.slow
def test_a_torch_base_streams_as_well(models: Path) -> None:
    if not (models / "small").exists():
        make(models / "small", "small")
    base = models / "torch"
    base.mkdir()
    tensors = {n: t for f in sorted((models / "small" / "base").glob("*.safetensors")) for n, t in load_file(f).items()}
    torch.save(tensors, base / "pytorch_model.bin")
    command = [*MERGE, base, models / "small" / "adapter", "-o", models / "ours"]
    fresh(models / "ours")
    seconds = measure(command)
    rss = peak([*command, "--force"])
    print(f"\n0.6 GB of .bin: {seconds:.2f} s, {rss:.0f} MB")
    assert rss <= RSS_LIMIT


@pytest.mark.slow
def test_large_model_against_a_copy(models: Path) -> None:
    if not (models / "large").exists():
        make(models / "large", "large")
    base, adapter = models / "large" / "base", models / "large" / "adapter"
    cores = len(os.sched_getaffinity(0))
    weights = sum(out * inp for out, inp in adapted("large").values())
    measure(["cp", "-r", base, fresh(models / "warm")])
    ours, copies = [], []
    for _ in range(3):
        copies.append(measure(["cp", "-r", base, fresh(models / "warm")]))
        fresh(models / "warm")
        ours.append(measure([*MERGE, base, adapter, "-o", fresh(models / "ours")]))
        fresh(models / "ours")
    mine, copy, compute = statistics.median(ours), statistics.median(copies), 5e-9 * weights / cores
    rss = peak([*MERGE, base, adapter, "-o", fresh(models / "ours")])
    fresh(models / "ours")
    print(f"\n6.2 GB: loratool {mine:.2f} s, {rss:.0f} MB; cp -r {copy:.2f} s; 5 ns a weight and core: {compute:.2f} s")
    print(f"ratio {mine / max(copy, compute):.2f} (at most 1.3)")
    assert mine <= 1.3 * max(copy, compute) and rss <= RSS_LIMIT


@pytest.mark.slow
def test_memory_on_one_wide_matrix(models: Path) -> None:
    make(models / "wide", "wide")
    command = [*MERGE, models / "wide" / "base", models / "wide" / "adapter", "-o", models / "out"]
    seconds, rss = measure(command), peak([*command, "--force"])
    print(f"\n128k x 4096: {seconds:.2f} s, {rss:.0f} MB")
    assert rss <= RSS_LIMIT
