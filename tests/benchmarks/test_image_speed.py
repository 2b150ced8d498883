"""Measure speed and memory on image models' files, as processes: pytest -m slow -s tests/benchmarks/test_image_speed.py

A merge into a single-file SD 1.5, against a copy; conversions of adapters of a gigabyte, whose memory must not grow.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from models import sd15, sd15_adapted, write_repeated
from test_merge_speed import COMMAND, MERGE, RSS_LIMIT, measure, peak

from loratool.files.dtypes import TensorSpec

CONVERT_LIMIT = 600  # MB, everything in
RANK = 16
D = 3072  # Flux's width
TEXT = "cond_stage_model.transformer."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("image")
    yield root
    shutil.rmtree(root)


def kohya(path: Path, adapted: Mapping[str, tuple[int, ...]]) -> Path:
    """Write an adapter of every linear layer and convolution; kohya's readers take a model's own names of SD 1 too."""
    tensors, g = {}, torch.Generator().manual_seed(1)
    for name, (out, inp, *kernel) in adapted.items():
        path_there = name.removesuffix(".weight").removeprefix("model.diffusion_model.").removeprefix(TEXT)
        stem = f"lora_{'te' if name.startswith(TEXT) else 'unet'}_{path_there.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = (torch.randn(RANK, inp, *kernel, generator=g) / inp**0.5).half()
        tensors[f"{stem}.lora_up.weight"] = (torch.randn(out, RANK, *[1] * len(kernel), generator=g) * 0.005).half()
        tensors[f"{stem}.alpha"] = torch.tensor(16.0)
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


@pytest.mark.slow
def test_a_merge_into_a_single_file_against_a_copy(folder: Path) -> None:
    base, adapted = folder / "base.safetensors", sd15_adapted()
    size = write_repeated(base, {name: TensorSpec("F16", shape) for name, shape in sd15()}, {"format": "pt"})
    adapter = kohya(folder / "adapter.safetensors", adapted)
    weights = sum(torch.Size(shape).numel() for shape in adapted.values())
    out, copy_of = folder / "out.safetensors", folder / "copy.safetensors"
    ours, copies = [], []
    measure(["cp", base, copy_of])
    for _ in range(3):
        copy_of.unlink()
        copies.append(measure(["cp", base, copy_of]))
        out.unlink(missing_ok=True)
        ours.append(measure([*MERGE, base, adapter, "-o", out]))
    rss = peak([*MERGE, base, adapter, "-o", out, "--force"])
    mine, copy = statistics.median(ours), statistics.median(copies)
    compute = 5e-9 * weights / len(os.sched_getaffinity(0))
    print(f"\n{size / 1e9:.2f} GB, {weights / 1e6:.0f}M adapted: loratool {mine:.2f} s, {rss:.0f} MB; cp {copy:.2f} s")
    print(f"5 ns a weight and core: {compute:.2f} s; ratio {mine / max(copy, compute):.2f} (at most 1.3)")
    assert mine <= 1.3 * max(copy, compute) and rss <= RSS_LIMIT


def flux(fused: bool) -> dict[str, tuple[int, int]]:
    """Write all blocks' linear layers in kohya's names, or in diffusers'."""
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(19):
        for side, own, more in (("img", "to_{}", "ff"), ("txt", "add_{}_proj", "ff_context")):
            if fused:
                stem = f"lora_unet_double_blocks_{i}_{side}"
                shapes |= {f"{stem}_attn_qkv": (3 * D, D), f"{stem}_attn_proj": (D, D)}
                shapes |= {f"{stem}_mlp_0": (4 * D, D), f"{stem}_mlp_2": (D, 4 * D)}
            else:
                stem = f"transformer.transformer_blocks.{i}"
                shapes |= {f"{stem}.attn.{own.format(x)}": (D, D) for x in "qkv"}
                shapes[f"{stem}.attn.{'to_out.0' if side == 'img' else 'to_add_out'}"] = (D, D)
                shapes |= {f"{stem}.{more}.net.0.proj": (4 * D, D), f"{stem}.{more}.net.2": (D, 4 * D)}
    for i in range(38):
        if fused:
            shapes |= {f"lora_unet_single_blocks_{i}_linear1": (7 * D, D)}
            shapes |= {f"lora_unet_single_blocks_{i}_linear2": (D, 5 * D)}
        else:
            stem = f"transformer.single_transformer_blocks.{i}"
            shapes |= {f"{stem}.attn.to_{x}": (D, D) for x in "qkv"}
            shapes |= {f"{stem}.proj_mlp": (4 * D, D), f"{stem}.proj_out": (D, 5 * D)}
    return shapes


def gigabyte(path: Path, fused: bool) -> int:
    """Write a Flux adapter of about 1 GB in bf16."""
    shapes = flux(fused)
    rank = round(1e9 / 2 / sum(out + inp for out, inp in shapes.values()))
    down, up = ("lora_down", "lora_up") if fused else ("lora_A", "lora_B")
    specs = {}
    for name, (out, inp) in shapes.items():
        specs |= {f"{name}.{down}.weight": TensorSpec("BF16", (rank, inp))}
        specs |= {f"{name}.{up}.weight": TensorSpec("BF16", (out, rank))}
    return write_repeated(path, specs, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (True, ["--to", "comfy"]),
        (True, ["--to", "diffusers"]),
        (False, ["--to", "kohya"]),
        (True, ["--to", "kohya", "--plain", "--dtype", "fp16"]),
    ],
    ids=["copied", "split", "fused", "plain"],
)
def test_a_conversion_streams(fused: bool, options: list[str], folder: Path) -> None:
    source, out = folder / f"flux-{fused}.safetensors", folder / "converted.safetensors"
    size = source.stat().st_size if source.exists() else gigabyte(source, fused)
    command = [*COMMAND, "convert", source, *options, "-o", out, "--force"]
    seconds, rss = measure(command), peak(command)
    sizes = f"{size / 1e9:.2f} GB to {out.stat().st_size / 1e9:.2f} GB"
    print(f"\n{' '.join(options)}: {sizes}: {seconds:.1f} s, {rss:.0f} MB (at most {CONVERT_LIMIT})")
    assert rss <= CONVERT_LIMIT
