"""Measure the CPU seconds of whole commands against peft's merge and against an import of numpy, in turns.

pytest -m slow -s tests/benchmarks/test_cpu_cost.py
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES

sys.path.insert(0, str(Path(__file__).parent))
from models import make
from test_merge_speed import cpu_of_children, peak
from test_resize_speed import write

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-c", "from loratool.cli import main; main()"]
MOST_MB = 150


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("models")
    make(root / "small", "small")
    yield root
    shutil.rmtree(root)


def cpu_of(command: list[object], made: Path | None = None) -> float:
    """Return the CPU seconds of a process and its workers. made: its output, which is removed before."""

    if made:
        shutil.rmtree(made, ignore_errors=True)
    before = cpu_of_children()
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return cpu_of_children() - before


def test_against_peft(models: Path) -> None:
    """0.6 GB in bf16, rank 16; unmerge and verify are compared with peft's merge."""
    base, adapter = models / "small" / "base", models / "small" / "adapter"
    out, back, plain, theirs = (models / name for name in ("out", "back", "plain", "theirs"))
    calls: dict[str, tuple[float, list[object], Path | None]] = {
        "merge": (0.22, ["merge", base, adapter, "-o", out], out),
        "unmerge": (0.25, ["unmerge", out, adapter, "-o", back], back),
        "verify": (0.22, ["verify", base, adapter, out], None),
        "merge --no-undo": (0.14, ["merge", base, adapter, "-o", plain, "--no-undo"], plain),
    }
    rival: list[object] = [sys.executable, Path(__file__).parent / "peft_merge.py", base, adapter, theirs]
    found: dict[str, list[float]] = {name: [] for name in ("peft", *calls)}
    for _ in range(3):
        found["peft"].append(cpu_of(rival, theirs))
        for name, (_, call, made) in calls.items():
            found[name].append(cpu_of([*COMMAND, *call, "-q"], made))
    yours = statistics.median(found["peft"])
    print(f"\npeft {yours:.2f} s of CPU")
    over = []
    for name, (limit, *_) in calls.items():
        mine = statistics.median(found[name])
        print(f"{name}: {mine:.2f} s, {mine / yours:.2f} (at most {limit})")
        over.append(mine / yours - limit)
    shutil.rmtree(out)
    most = peak([*COMMAND, "merge", base, adapter, "-o", out, "-q"])
    print(f"merge: {most:.0f} MB of all processes (at most {MOST_MB})")
    assert max(over) <= 0 and most <= MOST_MB


def test_against_an_import_of_numpy(tmp_path: Path) -> None:
    """The README's merge, and small commands: what they cost is their start; diff and resize are of 7B adapters."""
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    first, second = (write(tmp_path / name, 16, seed) for seed, name in enumerate(("first", "second")))
    calls: dict[str, tuple[float, list[object]]] = {
        "merge": (4.0, ["merge", base, adapter, "-o", tmp_path / "merged", "--force"]),
        "inspect": (3.5, ["inspect", adapter]),
        "diff": (14.0, ["diff", first, second]),
        "resize": (11.0, ["resize", first, "--rank", "8", "-o", tmp_path / "resized", "--force"]),
    }
    found: dict[str, list[float]] = {name: [] for name in ("numpy", *calls)}
    for _ in range(9):
        found["numpy"].append(cpu_of([sys.executable, "-c", "import numpy"]))
        for name, (_, call) in calls.items():
            found[name].append(cpu_of([*COMMAND, *call, "-q"]))
    numpy = statistics.median(found["numpy"])
    print(f"\nimport numpy: {numpy:.2f} s of CPU")
    ratios = {name: statistics.median(found[name]) / numpy for name in calls}
    for name, ratio in ratios.items():
        print(f"{name}: {statistics.median(found[name]):.2f} s, {ratio:.1f} (at most {calls[name][0]})")
    assert all(ratio <= calls[name][0] for name, ratio in ratios.items())
