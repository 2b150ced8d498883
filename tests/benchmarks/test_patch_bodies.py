"""Measure the bodies of patches: size, and CPU a weight, beside XOR and zstd of level 1 on the same numbers.

pytest -m slow -s tests/benchmarks/test_patch_bodies.py

And of the patch of a real pair, with MINILM=BASE:TUNED: all-MiniLM-L6-v2 and a full fine-tune of it, as
`sentence_similarity.py` says where they are.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import needs_passes
from safetensors import safe_open

import loratool
from loratool.numerics.passes.native import NATIVE
from loratool.patches.bodies.body import Body
from loratool.patches.bodies.table import BODIES, choose
from loratool.streaming.threads import one_thread

sys.path.insert(0, str(Path(__file__).parent))
from patch_changes import changes

pytestmark = pytest.mark.slow
zstandard = pytest.importorskip("zstandard")

SHAPE = (2048, 2048)
TURNS = 5
SAMPLE = 8, 1 << 14  # runs and their numbers

# at most, as parts of what XOR and zstd take: size, CPU of encoding, CPU of decoding
BOUNDS = {
    "RL step 1e-6": (0.37, 14, 15),
    "20 steps 1e-6": (0.39, 7, 9),
    "fine-tune 1e-3": (0.39, 7, 9),
    "fine-tune 1e-2": (0.63, 4, 8),
    "fp16 1e-3": (0.63, 4, 8),
    "fp8 1e-2": (0.60, 7, 12),
    "int4 1e-2": (0.60, 7, 12),
    "fp32 1e-3": (0.78, 15, 15),
}
FAST_BOUNDS = {
    "RL step 1e-6": (0.56, 2.5, 3.5),
    "20 steps 1e-6": (0.56, 2.5, 3.5),
    "fine-tune 1e-3": (0.56, 2.5, 3.5),
    "fine-tune 1e-2": (0.73, 2.5, 3.5),
}
REAL = 0.67  # of the real pair, all of the patch's file
WITH_PASSES = 6  # ns a weight either way, of `classes`; measured 3 to 4


def least(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what work returns, and the least CPU a weight in ns."""
    found, times = None, []
    with one_thread():
        for _ in range(TURNS):
            start = time.thread_time()
            found = work()
            times.append(time.thread_time() - start)
    return found, min(times) / SHAPE[0] / SHAPE[1] * 1e9


def sampled(x: Any) -> Any:
    runs, size = SAMPLE
    return np.concatenate([x[(len(x) - size) * i // (runs - 1) :][:size] for i in range(runs)])


class Measured(NamedTuple):
    data: bytes
    encoded: float  # ns of CPU a weight
    decoded: float
    reverse: int  # bytes
    reversed: float


def measure(body: Body, base: Any, target: Any, dtype: str) -> Measured:
    out = np.empty_like(target)
    data, encoded = least(lambda: body.encode(base, target, dtype))
    _, decoded = least(lambda: body.decode(base, data, dtype, out))
    assert (out == target).all()
    back, took = least(lambda: body.back(base, target, dtype))
    return Measured(data, encoded, decoded, len(back), took)


def measure_xor(base: Any, target: Any) -> Measured:
    data, encoded = least(lambda: zstandard.compress((base ^ target).tobytes(), 1))
    _, decoded = least(lambda: np.frombuffer(zstandard.decompress(data), base.dtype) ^ base)
    return Measured(data, encoded, decoded, 0, 0)


@needs_passes
@pytest.mark.parametrize("is_fast", [False, True], ids=["", "fast"])
def test_bodies_beside_xor_and_zstd(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = FAST_BOUNDS if is_fast else BOUNDS
    for name, dtype, base, target in changes(*SHAPE):
        if name not in bounds:
            continue
        key = choose(sampled(base), sampled(target), dtype, is_fast)
        xor = measure_xor(base, target)
        monkeypatch.setenv(NATIVE, "0")
        without = measure(BODIES[key], base, target, dtype)
        monkeypatch.setenv(NATIVE, "1")
        found = measure(BODIES[key], base, target, dtype)
        print(
            f"{name:15s} XOR {len(xor.data) / target.nbytes:.2%} ({xor.encoded:.1f}/{xor.decoded:.1f} ns), {key} "
            f"{len(found.data) / target.nbytes:.2%}, {len(found.data) / len(xor.data):.3f} x "
            f"({found.encoded:.1f}/{found.decoded:.1f} ns, pure {without.encoded:.1f}/{without.decoded:.1f}); "
            f"reverse {found.reverse / target.nbytes:.3%} ({found.reversed:.1f} ns)",
            flush=True,
        )
        size, encoded, decoded = bounds[name]
        assert found.data == without.data and len(found.data) <= size * len(xor.data)
        assert found.encoded <= encoded * xor.encoded and found.decoded <= decoded * xor.decoded
        assert key != "classes" or max(found.encoded, found.decoded) <= WITH_PASSES


def test_the_real_pair_beside_xor_and_zstd(tmp_path: Path) -> None:
    if not (given := os.environ.get("MINILM")):
        pytest.skip("needs MINILM=BASE:TUNED")
    base, tuned = (Path(each) for each in given.split(":"))
    report = loratool.patch(base, tuned, tmp_path / "p")
    xor = nbytes = 0
    with safe_open(base / "model.safetensors", "np") as first, safe_open(tuned / "model.safetensors", "np") as second:
        for name in second.keys():  # noqa: SIM118
            before, after = (each.get_tensor(name).view("u4") for each in (first, second))
            xor += len(zstandard.compress((before ^ after).tobytes(), 1))
            nbytes += after.nbytes
    found = report.nbytes / xor
    print(f"XOR {xor / nbytes:.1%} of {nbytes:,} bytes, the patch {report.nbytes / nbytes:.1%}, {found:.3f} x")
    loratool.apply(base, tmp_path / "p", tmp_path / "out")
    made, wanted = (each / "model.safetensors" for each in (tmp_path / "out", tuned))
    assert made.read_bytes() == wanted.read_bytes() and found <= REAL
