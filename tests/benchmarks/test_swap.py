"""Measure the CPU seconds of a swap against those of an unmerge and a merge, in turns.

pytest -m slow -s tests/benchmarks/test_swap.py
"""

from __future__ import annotations

import filecmp
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from models import make
from test_cpu_cost import COMMAND, cpu_of

pytestmark = pytest.mark.slow
ROUNDS = 5
MOST = 0.85  # of the CPU of unmerge and merge, which also write and read the base


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("swap")
    make(root / "small", "small")
    yield root
    shutil.rmtree(root)


def test_a_swap_beside_an_unmerge_and_a_merge(models: Path) -> None:
    """On a model of 0.6 GB; each round has all three, and every merge writes an undo file."""
    base, old = models / "small" / "base", models / "small" / "adapter"
    new = f"{old}:0.5"
    merged, unmerged, both, swapped = (models / each for each in ("merged", "unmerged", "both", "swapped"))
    cpu_of([*COMMAND, "merge", base, old, "-o", merged])
    shares, rows = [], []
    for _ in range(ROUNDS):
        back = cpu_of([*COMMAND, "unmerge", merged, old, "-o", unmerged], unmerged)
        again = cpu_of([*COMMAND, "merge", unmerged, new, "-o", both], both)
        swap = cpu_of([*COMMAND, "merge", merged, new, "--replace", old, "-o", swapped], swapped)
        shares.append(swap / (back + again))
        rows.append(f"unmerge {back:.2f} s, merge {again:.2f} s, swap {swap:.2f} s: {shares[-1]:.2f}")
    print("", *rows, sep="\n")
    files = sorted(path.name for path in both.iterdir() if path.name != "README.md")
    assert filecmp.cmpfiles(both, swapped, files, shallow=False)[0] == files
    assert len(files) > 3
    assert statistics.median(shares) <= MOST
