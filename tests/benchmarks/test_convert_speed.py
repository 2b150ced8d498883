"""Measure speed and memory of convert on a 6 GB checkpoint, as whole processes against `cp -r`, warm and with a `sync`.

    pytest -m slow -s tests/benchmarks/test_convert_speed.py

The way to torch's file reads each byte in the program, for the CRC-32 that a zip file has; the way back never does.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from models import make
from test_merge_speed import COMMAND, RSS_LIMIT, fresh, measure, peak

CONVERT = [*COMMAND, "convert", "-q"]
# What is converted, and how.
WAYS = {
    "to torch": ("base", ["--to", "torch"]),
    "to safetensors": ("torch", []),
    "to other shards": ("base", ["--max-shard-size", "1GB"]),
    "to fp16": ("base", ["--dtype", "fp16"]),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("large")
    make(root / "large", "large")
    measure([*CONVERT, root / "large" / "base", "--to", "torch", "-o", root / "large" / "torch"])
    yield root / "large"
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_against_a_copy(large: Path, way: str) -> None:
    source, options = large / WAYS[way][0], WAYS[way][1]
    command = [*CONVERT, source, *options, "-o", large / "ours"]
    measure(["cp", "-r", source, fresh(large / "copy")])
    ours, copies = [], []
    for _ in range(3):
        copies.append(measure(["cp", "-r", source, fresh(large / "copy")]))
        fresh(large / "copy")
        fresh(large / "ours")
        ours.append(measure(command))
    fresh(large / "ours")
    rss = peak(command)
    fresh(large / "ours")
    mine, copy = statistics.median(ours), statistics.median(copies)
    print(f"\n6.2 GB {way}: loratool {mine:.2f} s, {rss:.0f} MB; cp -r {copy:.2f} s")
    print(f"ratio {mine / copy:.2f} (at most 1.3)")
    assert rss <= RSS_LIMIT
    assert mine <= 1.3 * copy
