"""Measure a merge in place beside a merge with an output, in turns on the same disk.

pytest -m slow -s tests/benchmarks/test_in_place_speed.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from models import make
from test_merge_speed import COMMAND

pytestmark = pytest.mark.slow
ROUNDS = 4
MOST = 1.6  # times the seconds of a merge with an output: each changed byte is written twice, and read twice


def seconds(*words: object) -> float:
    """Return how long a command takes, from a disk that has nothing left to write to one that has nothing left."""
    os.sync()
    start = time.monotonic()
    subprocess.run([*COMMAND, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    os.sync()
    return time.monotonic() - start


def test_in_place_beside_an_output(tmp_path: Path) -> None:
    """On a model of 0.6 GB in two files; the least of the rounds counts, as others use the disk too."""
    make(tmp_path / "small", "small")
    base, adapter = tmp_path / "small" / "base", tmp_path / "small" / "adapter"
    out, model = tmp_path / "out", tmp_path / "model"
    times: dict[str, list[float]] = {"-o": [], "shard": [], "window": []}
    for _ in range(ROUNDS):
        shutil.rmtree(out, ignore_errors=True)
        times["-o"].append(seconds("merge", base, adapter, "-o", out))
        for by in ("shard", "window"):
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(base, model)
            times[by].append(seconds("merge", model, adapter, "--in-place", "--by", by))
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (model / shard.name).read_bytes()
    least = {way: min(each) for way, each in times.items()}
    print("", *(f"{way}: {', '.join(f'{each:.2f}' for each in found)} s" for way, found in times.items()), sep="\n")
    assert least["shard"] <= MOST * least["-o"] and least["window"] <= MOST * least["-o"], least
