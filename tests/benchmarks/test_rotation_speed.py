"""Measure the CPU seconds of merging rotations against those of LoRA of rank 16 on the same layers, in turns.

pytest -m slow -s tests/benchmarks/test_rotation_speed.py
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from test_cpu_cost import COMMAND, cpu_of

pytestmark = pytest.mark.slow
ROUNDS, LAYERS, WIDTH = 3, 8, 4096
MOST = {"--no-undo": 3.0, "with undo": 4.0}  # times LoRA's CPU; HiRA, which mixes nothing, is only printed
Maker = Callable[[torch.Generator], dict[str, Tensor]]


def draw(g: torch.Generator, *shape: int, size: float) -> Tensor:
    return torch.randn(shape, generator=g) * size


# kind -> its tensors of a layer, and fields of the config
KINDS: dict[str, tuple[Maker, dict[str, object]]] = {
    "lora": (
        lambda g: {
            "lora_A.weight": draw(g, 16, WIDTH, size=0.01),
            "lora_B.weight": draw(g, WIDTH, 16, size=0.01),
        },
        {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "fan_in_fan_out": False},
    ),
    "oft": (lambda g: {"oft_R.weight": draw(g, WIDTH // 32, 496, size=0.002)}, {"peft_type": "OFT"}),
    "oft by rows": (
        lambda g: {"oft_r": draw(g, WIDTH // 32, 32, 32, size=0.002)},
        {"peft_type": "OFT", "peft_version": None},
    ),
    "hra": (lambda g: {"hra_u": draw(g, WIDTH, 8, size=0.01)}, {"peft_type": "HRA", "r": 8}),
    "hira": (
        lambda g: {"hira_A": draw(g, 32, WIDTH, size=0.02), "hira_B": draw(g, WIDTH, 32, size=0.02)},
        {"peft_type": "HIRA", "r": 32, "fan_in_fan_out": False},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root, g = tmp_path_factory.mktemp("rotations"), torch.Generator().manual_seed(0)
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    weights = {f"{path}.weight": draw(g, WIDTH, WIDTH, size=0.02).bfloat16() for path in paths}
    save_file(weights, root / "base.safetensors")
    for kind, (make, config) in KINDS.items():
        tensors = {f"base_model.model.{path}.{role}": x for path in paths for role, x in make(g).items()}
        (root / kind).mkdir()
        save_file(tensors, root / kind / "adapter_model.safetensors")
        fields = {"target_modules": ["q_proj"], "peft_version": "0.21.2", **config}
        (root / kind / "adapter_config.json").write_text(json.dumps(fields))
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_a_rotation_beside_lora(models: Path, kind: str) -> None:
    """On 0.27 GB of bf16."""
    shares: dict[str, list[float]] = {way: [] for way in MOST}
    for _ in range(ROUNDS):
        for way in MOST:
            cpu = {}
            for each in ("lora", kind):
                out = models / f"out {each}.safetensors"
                more = ["--no-undo"] if way == "--no-undo" else []
                base, adapter = models / "base.safetensors", models / each
                cpu[each] = cpu_of([*COMMAND, "merge", base, adapter, "-o", out, "--force", *more])
            shares[way].append(cpu[kind] / cpu["lora"])
    undo = (models / f"out {kind}.undo").stat().st_size / (LAYERS * WIDTH * WIDTH * 2)
    found = {way: statistics.median(each) for way, each in shares.items()}
    print(f"\n{kind}: {found['--no-undo']:.2f} and {found['with undo']:.2f} times, undo file {undo:.2%} of the model")
    assert kind == "hira" or all(found[way] <= MOST[way] for way in MOST)
