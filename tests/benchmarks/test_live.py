"""Merge in memory beside peft: drift, time and memory. pytest -m slow -s tests/benchmarks/test_live.py"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loratool

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RANK, RELATIVE = 16, 0.16  # ||D|| / ||W||, that of trl#6688
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEBI = 1 << 20
ROUNDS = 3  # the least of each time counts


def make(layers: int, width: int) -> Any:
    """Return a Llama in bf16 with random factors around it, in float32, as peft makes them."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 2048}
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).bfloat16()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    move(wrapped, 1.0)
    return wrapped


def move(model: Any, share: float) -> None:
    """Replace a share of each factor by random numbers of the size that makes ||D|| / ||W|| RELATIVE."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            std = module.get_base_layer().weight.data.float().std()
            kept = (1 - share**2) ** 0.5
            A.mul_(kept).add_(torch.randn_like(A) * share)
            B.mul_(kept).add_(torch.randn_like(B) * share * RELATIVE * std / RANK**0.5)


def linear(model: Any) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in model.named_parameters() if name.endswith("base_layer.weight")}


def drift(model: Any, before: dict[str, Tensor]) -> tuple[float, float]:
    """Return the share of the weights that differ, and the largest error in mean weights."""
    now = linear(model)
    off = sum(int((now[n] != x).sum()) for n, x in before.items()) / sum(x.numel() for x in before.values())
    worst = max(float((now[n].float() - x.float()).abs().max() / x.float().abs().mean()) for n, x in before.items())
    return off, worst


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return a result, its seconds, and the bytes of memory at its peak beyond those before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that since now
    before, start = resident("VmRSS"), time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, resident("VmHWM") - before


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "trained"])
def test_the_drift(moving: bool, tmp_path: Path) -> None:
    """Of 1 and 100 cycles, with one adapter or one that moves between."""
    theirs, ours = make(1, 512), make(1, 512)
    before = {name: x.clone() for name, x in linear(ours).items()}
    for cycle in range(1, 101):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        ours.save_pretrained(tmp_path / "adapter")
        loratool.live.merge(ours, tmp_path / "adapter").unmerge()
        if cycle in (1, 10, 100):
            (off, worst), mine = drift(theirs, before), drift(ours, before)
            print(f"{cycle} cycles, {'trained' if moving else 'fixed'}: peft {off:.1%} off, {worst:.3f}; ours {mine}")
            assert mine == (0.0, 0.0) and off > 0.1
        for model in (theirs, ours) if moving else ():
            torch.manual_seed(cycle)
            move(model, 0.1)


def test_time_and_memory(tmp_path: Path) -> None:
    """On 0.6 GB of bf16: a merge, a swap, an unmerge, and what the handle holds."""
    model = make(24, 1024)
    weights = linear(model)
    size = sum(x.nbytes for x in weights.values())
    before = {name: x.clone() for name, x in weights.items()}
    factors = sum(x.nbytes for name, x in model.named_parameters() if "lora_" in name)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        move(model, 1.0)
    print(f"{size / 1e6:.0f} MB of weights in {len(weights)} matrices, rank {RANK}, {torch.get_num_threads()} threads")
    one, two = tmp_path / "one", tmp_path / "two"
    best: dict[str, list[float]] = {}
    peak = held = 0
    for _ in range(ROUNDS):
        for check in ("sha256", "sum"):
            live, merge, at_merge = measured(lambda check=check: loratool.live.merge(model, one, check=check))
            held = live.nbytes
            _, swap, at_swap = measured(lambda live=live: live.swap(two))
            _, unmerge, at_unmerge = measured(live.unmerge)
            peak = max(peak, at_merge, at_swap, at_unmerge)
            best[check] = [*map(min, zip(best.get(check, [9e9] * 3), (merge, swap, unmerge), strict=True))]
            assert drift(model, before) == (0.0, 0.0)
        _, merge, at_merge = measured(model.merge_adapter)
        _, unmerge, at_unmerge = measured(model.unmerge_adapter)
        best["peft"] = [*map(min, zip(best.get("peft", [9e9] * 2), (merge, unmerge), strict=True))]
        (off, _), at_peft = drift(model, before), max(at_merge, at_unmerge)
        for name, x in weights.items():
            x.copy_(before[name])
    for name, times in best.items():
        each = ", ".join(f"{spent:.2f} s ({spent / size * 2e9:.1f} ns a weight)" for spent in times)
        print(f"{name}: {'merge, swap, unmerge' if len(times) == 3 else 'merge, unmerge'} {each}")
    print(f"peak {peak / MEBI:.0f} MiB, peft's {at_peft / MEBI:.0f} MiB, after which {off:.1%} were off")
    shares = f"records {(held - factors) / size:.2%} of the weights, factors {factors / size:.2%}"
    print(f"held {held / MEBI:.1f} MiB: {shares}")
    merge, swap, unmerge = best["sum"]
    assert held - factors <= 0.02 * size and peak <= held + 0.2 * size
    assert swap <= 1.2 * (merge + unmerge) and merge <= 2 * best["peft"][0]
