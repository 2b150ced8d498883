"""Race extract against mergekit-extract-lora and torch.svd_lowrank in one run: time, memory, and the energy kept.

pytest -m slow -s tests/benchmarks/test_extract_speed.py; mergekit-extract-lora is taken from PATH or from $MERGEKIT
(a folder with its commands), since mergekit's own requirements do not fit beside ours.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from models import make, make_tuned
from test_cpu_cost import cpu_of
from test_merge_speed import COMMAND, fresh, measure, peak

from loratool.numerics.seeded_random import Draw
from loratool.numerics.svd import truncated_svd

RANK = 32
MERGEKIT = shutil.which("mergekit-extract-lora", path=os.environ.get("MERGEKIT", os.environ["PATH"]))
ONE_MATRIX = 5632 * 2048 * 4 / 1e6  # MB, the largest of the small model in float32
LLAMA_7B = [(4096, 4096), (4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("extract")
    make(root, "small")
    make_tuned(root, "small")
    yield root
    shutil.rmtree(root)


def load(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def changes(folder: Path) -> Iterator[tuple[str, Tensor]]:
    base, tuned = load(folder / "base"), load(folder / "tuned")
    for name in base:
        if "layers" in name and base[name].dim() == 2:
            yield name, tuned[name].float() - base[name].float()


def optimum(D: Tensor) -> float:
    wide = (D if D.shape[0] >= D.shape[1] else D.T).double()
    return float(torch.linalg.eigvalsh(wide.T @ wide)[-RANK:].sum())


def kept(D: Tensor, B: Tensor, A: Tensor) -> float:
    return float(D.double().square().sum() - (D.double() - B.double() @ A.double()).square().sum())


def energies(folder: Path, adapter: Path) -> list[float]:
    """Return the energy of each matrix that an adapter keeps, relative to the exact optimum of its rank."""
    tensors = load(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    found = []
    for name, D in changes(folder):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        B, A = (next(t for k, t in tensors.items() if k.endswith(f"{key}{side}.weight")) for side in "BA")
        found.append(kept(D, B.float() * scale, A.float()) / optimum(D))
    return found


@pytest.mark.slow
def test_the_command_against_mergekit(folder: Path) -> None:
    ours = [*COMMAND, "extract", "-q", folder / "base", folder / "tuned", "--rank", str(RANK), "-o"]
    mine = sorted(cpu_of([*ours, folder / "ours"], folder / "ours") for _ in range(3))[1]
    seconds = measure([*ours, fresh(folder / "ours")])
    mb = peak([*ours, fresh(folder / "ours")])
    mean = energies(folder, folder / "ours")
    print(f"\nloratool {seconds:.2f} s, {mine:.2f} s of CPU, {mb:.0f} MB")
    print(f"energy {min(mean):.6f} to {max(mean):.6f} of the optimum")
    assert min(mean) >= 0.9999 and mb <= ONE_MATRIX + 1000
    assert MERGEKIT, "mergekit-extract-lora is not in PATH: pip install mergekit in an environment, MERGEKIT=ENV/bin"
    out = folder / "theirs"
    paths = ["--model", folder / "tuned", "--base-model", folder / "base", "--out-path", out]
    options = ["--exclude-regex", "lm_head|embed", "--skip-undecomposable", "--no-copy-tokenizer"]
    rival = [MERGEKIT, "--max-rank", str(RANK), *paths, *options]
    theirs = cpu_of(rival, out)
    fresh(out)
    rival_seconds = measure(rival)
    fresh(out)
    rival_mb = peak(rival)
    rival_mean = energies(folder, folder / "theirs")
    print(f"mergekit {rival_seconds:.2f} s, {theirs:.2f} s of CPU, {rival_mb:.0f} MB")
    print(f"energy {min(rival_mean):.6f} to {max(rival_mean):.6f}")
    print(f"CPU 1/{theirs / mine:.0f} (at most 1/17)")
    assert mine <= theirs / 17


def timed(work: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def race(title: str, matrices: Iterator[tuple[str, Tensor]], bound: float) -> None:
    """Time the compute alone, matrix by matrix, both sides in turn: the exact SVD, torch.svd_lowrank, ours."""
    seconds = dict.fromkeys(("exact", "lowrank", "ours"), 0.0)
    share: dict[str, list[float]] = {"lowrank": [], "ours": []}

    def ours(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        svd = truncated_svd(D.numpy(), RANK, Draw(0, "x"))
        U, S, V = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in (svd.U, svd.S, svd.V))
        return U, S, V

    for _, D in matrices:
        t, (_, S, _) = timed(lambda D=D: torch.linalg.svd(D, full_matrices=False))  # type: ignore[misc]
        seconds["exact"] += t
        best = float(S[:RANK].double().square().sum())
        for name, way in (("lowrank", lambda D: torch.svd_lowrank(D, q=RANK, niter=2)), ("ours", ours)):
            t, (U, S, V) = timed(lambda D=D, way=way: way(D))  # type: ignore[misc]
            seconds[name] += t
            share[name].append(kept(D, U * S, V.T) / best)
    print(f"\n{title}: exact SVD {seconds['exact']:.2f} s")
    for name, found in share.items():
        print(f"  {name} {seconds[name]:.2f} s, 1/{seconds['exact'] / seconds[name]:.0f}, energy from {min(found):.5f}")
    assert min(share["ours"]) >= 0.9999 and seconds["ours"] <= seconds["exact"] * bound


@pytest.mark.slow
def test_compute_on_the_small_model(folder: Path) -> None:
    race("0.6 GB model, rank 32", changes(folder), 1 / 25)


@pytest.mark.slow
def test_compute_on_a_block_of_7b_shapes() -> None:
    g = torch.Generator().manual_seed(0)

    def matrices() -> Iterator[tuple[str, Tensor]]:
        for out, inp in LLAMA_7B:
            k = 512
            A, B = torch.randn(k, inp, generator=g) / math.sqrt(inp), torch.randn(out, k, generator=g) / math.sqrt(out)
            yield "", (B * torch.arange(1, k + 1) ** -0.7) @ A + torch.randn(out, inp, generator=g) * 1e-4

    race("one block of Llama-2-7B, rank 32", matrices(), 1 / 50)


@pytest.mark.slow
def test_compute_on_a_flat_spectrum() -> None:
    g = torch.Generator().manual_seed(0)
    race("Gaussian 2048 x 2048, rank 32", (("", torch.randn(2048, 2048, generator=g)) for _ in range(2)), 1 / 5)
