"""Measure what is too many or too large, as whole processes: pytest -m slow -s tests/benchmarks/test_load.py

100,000 tensors, one tensor of 2 GB, and adapters of rank 4096, whose factors are as large as what they change.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from models import write_repeated
from test_merge_speed import COMMAND, RSS_LIMIT, cpu_of_children, fresh, measure, peak

from loratool.files.dtypes import TensorSpec
from loratool.streaming.parallel import worker_count

MANY = 100_000
SMALL = TensorSpec("BF16", (8, 8))
MODULE = "model.layers.{}.mlp.experts.{}.up_proj"
INSPECT_LIMIT = 200  # MB
HUGE = (131_072, 8192)  # 2.1 GB
UP = "model.layers.0.mlp.up_proj"
PER_NUMBER = 40  # bytes that a worker has for each number of a factor


def write_base(folder: Path, tensors: dict[str, TensorSpec], shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')  # which says how square matrices lie
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        write_repeated(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, modules: dict[str, tuple[int, ...]], rank: int) -> Path:
    folder.mkdir()
    sides = {
        f"base_model.model.{module}.lora_{side}.weight": TensorSpec("BF16", shape)
        for module, (out, inp) in modules.items()
        for side, shape in (("A", (rank, inp)), ("B", (out, rank)))
    }
    write_repeated(folder / "adapter_model.safetensors", sides, {"format": "pt"}, scale=0.002)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Return checkpoints of 100,000 small tensors, and an adapter of as many."""
    root = tmp_path_factory.mktemp("many")
    modules = [MODULE.format(i // 400, i % 400) for i in range(MANY)]
    tensors = dict.fromkeys((f"{module}.weight" for module in modules), SMALL)
    yield {
        "one file": write_base(root / "one", tensors),
        "20 shards": write_base(root / "shards", tensors, 20),
        "adapter": write_adapter(root / "adapter", dict.fromkeys(modules[: MANY // 2], (8, 8)), 2),
        "root": root,
    }
    fresh(root)


def report(what: str, command: list[object]) -> tuple[float, float]:
    """Return seconds of CPU, as other processes cost others, and the peak memory in MB of a second run."""
    before, start = cpu_of_children(), time.perf_counter()
    measure(command)
    seconds, took = cpu_of_children() - before, time.perf_counter() - start
    rss = peak(command)
    print(f"\n{what}: {took:.1f} s, {seconds:.1f} s of CPU, {rss:.0f} MB")
    return seconds, rss


@pytest.mark.slow
@pytest.mark.parametrize("which", ["one file", "20 shards"])
def test_inspect_many(many: dict[str, Path], which: str) -> None:
    seconds, rss = report(f"inspect, 100,000 tensors in {which}", [*COMMAND, "inspect", many[which]])
    assert seconds <= 2 and rss <= INSPECT_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("one file", ["--max-shard-size", "2MB"]),
        ("20 shards", ["--max-shard-size", "1GB"]),
        ("one file", ["--dtype", "fp32"]),
        ("one file", ["--to", "torch"]),
        ("adapter", ["--to", "peft", "--plain"]),
    ],
)
def test_convert_many(many: dict[str, Path], which: str, options: list[str]) -> None:
    out = many["root"] / "out"
    command = [*COMMAND, "convert", "-q", "--force", many[which], *options, "-o", out]
    seconds, _ = report(f"convert {' '.join(options)}, 100,000 tensors in {which}", command)
    assert seconds <= 15  # wall time: 10


@pytest.mark.slow
def test_one_tensor_of_2_gb(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{UP}.weight": TensorSpec("BF16", HUGE)})
    adapter = write_adapter(tmp_path / "adapter", {UP: HUGE}, 16)
    for undo in (["--no-undo"], []):
        command = [*COMMAND, "merge", "-q", "--force", base, adapter, *undo, "-o", tmp_path / "out"]
        _, rss = report(f"merge into one tensor of 2.1 GB {' '.join(undo)}", command)
        assert rss <= RSS_LIMIT
    back = [*COMMAND, "unmerge", "-q", "--force", tmp_path / "out", adapter, "-o", tmp_path / "back"]
    _, rss = report("unmerge of it", back)
    assert rss <= RSS_LIMIT
    fresh(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [4096, 8192])
def test_rank_4096(tmp_path: Path, width: int) -> None:
    """Each worker has the factors of its module, as they are stored, in float64 and as the products take them."""
    modules = {UP.replace("0", str(i)): (width, width) for i in range(2)}
    base = write_base(tmp_path / "base", {f"{m}.weight": TensorSpec("BF16", s) for m, s in modules.items()})
    adapter = write_adapter(tmp_path / "adapter", modules, 4096)
    limit = RSS_LIMIT + worker_count() * PER_NUMBER * 4096 * width / 1e6
    for undo in (["--no-undo"], []):
        command = [*COMMAND, "merge", "-q", "--force", base, adapter, *undo, "-o", tmp_path / "out"]
        _, rss = report(f"merge of rank 4096 into 2 of {width} x {width} {' '.join(undo)}", command)
        assert rss <= limit
    fresh(tmp_path)
