"""Measure why one merges: Table 1 of the LoRA paper here. python tests/benchmarks/latency.py [--trials N] [--limit S]

One forward pass of GPT-2 medium (random weights) with LoRA merged, LoRA beside the weights, and the adapters of
Houlsby (Adapter^H) and Lin (Adapter^L), at the paper's batches and lengths. The methods take turns in every round, so
that what else the machine does meets all alike. Medians, ± half of the span of the middle 50 %; `added` is the median
of the rounds' own ratios. fp32 on a CPU, 16 bits on CUDA (the paper: a Quadro RTX8000). A report: nothing fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, HEADS, VOCABULARY, POSITIONS = 24, 1024, 16, 50257, 1024
ROUNDS = {"cuda": 100, "cpu": 10}  # the paper's 100 would take a CPU minutes


class Extra(nn.Module):
    """The additions of a method to a block: here none. Each hook gets (batch, length, d) and returns it."""

    def qkv(self, h: Tensor, linear: nn.Linear) -> Tensor:
        return linear(h)

    def after_attention(self, h: Tensor) -> Tensor:
        return h

    def after_mlp(self, h: Tensor) -> Tensor:
        return h

    def after_block(self, x: Tensor) -> Tensor:
        return x


class LoRA(Extra):
    """B A x beside the weights of q and v, scale 1; A of both in one matrix, as in microsoft/LoRA's MergedLinear."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.A = nn.Linear(d, 2 * r, bias=False)
        self.B_q, self.B_v = nn.Linear(r, d, bias=False), nn.Linear(r, d, bias=False)

    def qkv(self, h: Tensor, linear: nn.Linear) -> Tensor:
        q, k, v = linear(h).chunk(3, dim=-1)
        low_q, low_v = self.A(h).chunk(2, dim=-1)
        return torch.cat([q + self.B_q(low_q), k, v + self.B_v(low_v)], dim=-1)


class Merged(Extra):
    """LoRA in the weights: W + B A, of W's shape."""

    def __init__(self, lora: LoRA, linear: nn.Linear) -> None:
        super().__init__()
        A_q, A_v = lora.A.weight.chunk(2)
        W = linear.weight.detach().clone()
        W[: len(W) // 3] += lora.B_q.weight @ A_q
        W[-len(W) // 3 :] += lora.B_v.weight @ A_v
        self.W = nn.Parameter(W)

    def qkv(self, h: Tensor, linear: nn.Linear) -> Tensor:
        return F.linear(h, self.W, linear.bias)


class Bottleneck(nn.Module):
    def __init__(self, d: int, r: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down, self.up, self.activation = nn.Linear(d, r), nn.Linear(r, d), activation

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.activation(self.down(h)))


class Houlsby(Extra):
    """Adapter^H (Houlsby et al. 2019): one after the attention and one after the MLP, each before the residual."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.attention, self.mlp = Bottleneck(d, r, F.gelu), Bottleneck(d, r, F.gelu)

    def after_attention(self, h: Tensor) -> Tensor:
        return h + self.attention(h)

    def after_mlp(self, h: Tensor) -> Tensor:
        return h + self.mlp(h)


class Lin(Extra):
    """Adapter^L (Lin et al. 2020): one behind the block, after a LayerNorm of its own."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.norm, self.adapter = nn.LayerNorm(d), Bottleneck(d, r, F.relu)

    def after_block(self, x: Tensor) -> Tensor:
        return x + self.adapter(self.norm(x))


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ln_2, self.c_fc, self.c_out = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, extra: Extra) -> Tensor:
        qkv = extra.qkv(self.ln_1(x), self.c_attn)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + extra.after_attention(self.c_proj(mixed))
        x = x + extra.after_mlp(self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")))
        return extra.after_block(x)


class GPT2(nn.Module):
    def __init__(self, layers: int, d: int, heads: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(positions, d)
        self.blocks, self.ln_f = nn.ModuleList(Block(d, heads) for _ in range(layers)), nn.LayerNorm(d)

    def forward(self, tokens: Tensor, extras: Sequence[Extra]) -> Tensor:
        """Compute the logits of the last position, (batch, vocabulary). tokens: (batch, length)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block, extra in zip(self.blocks, extras, strict=True):
            x = block(x, extra)
        return self.ln_f(x[:, -1]) @ self.wte.weight.T


# method -> its part of a block and, for each |Theta|, the rank or bottleneck; of 0.5M the paper does not say which
METHODS: dict[str, tuple[Callable[[int, int], Extra], dict[str, int]]] = {
    "LoRA, unmerged": (LoRA, {"0.5M": 5, "11M": 112}),
    "Adapter^L": (Lin, {"0.5M": 8, "11M": 224}),
    "Adapter^H": (Houlsby, {"0.5M": 5, "11M": 112}),
}
MERGED = "LoRA, merged"
# (batch, length, |Theta|) -> the paper's ms (Table 1)
PAPER = {
    (1, 128, "11M"): {MERGED: 19.8, "Adapter^L": 23.9, "Adapter^H": 25.8},
    (16, 256, "11M"): {MERGED: 338.0, "Adapter^L": 354.8, "Adapter^H": 366.3},
    (32, 512, "0.5M"): {MERGED: 1449.4, "Adapter^L": 1482.0, "Adapter^H": 1492.2},
}


def make_extras(model: GPT2, budget: str) -> dict[str, nn.ModuleList]:
    """Make one random addition a block for every method; the merged LoRA is the unmerged one."""
    weight = model.wte.weight
    extras = {
        name: nn.ModuleList(make(weight.shape[1], ranks[budget]) for _ in model.blocks).to(weight)
        for name, (make, ranks) in METHODS.items()
    }
    loras = zip(extras["LoRA, unmerged"], model.blocks, strict=True)
    return {MERGED: nn.ModuleList(Merged(lora, block.c_attn) for lora, block in loras), **extras}


def measure(model: GPT2, extras: dict[str, nn.ModuleList], tokens: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the ms of each method in each round; each round begins with another method."""
    names = list(extras)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-1, rounds):  # the first to warm up
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            model(tokens, extras[name])
            if tokens.is_cuda:
                torch.cuda.synchronize()
            if i >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return middle, (high - low) / 2


def rows(
    setting: tuple[int, int, str], extras: dict[str, nn.ModuleList], times: dict[str, list[float]]
) -> Iterator[str]:
    batch, length, budget = setting
    paper = PAPER[setting]
    for name, own in times.items():
        count = sum(p.numel() for p in extras["LoRA, unmerged" if name == MERGED else name].parameters())
        added, paper_added = "", ""
        if name != MERGED:
            share, spread = median_and_spread([100 * (a / b - 1) for a, b in zip(own, times[MERGED], strict=True)])
            added = f"{share:+.1f} ± {spread:.1f} %"
            paper_added = f"{100 * (paper[name] / paper[MERGED] - 1):+.1f} %" if name in paper else ""
        ms = "{:.1f} ± {:.1f}".format(*median_and_spread(own))
        cells = [
            f"{batch} x {length}",
            budget,
            name,
            f"{count / 1e6:.2f}M",
            ms,
            added,
            str(paper.get(name, "")),
            paper_added,
        ]
        yield f"| {' | '.join(cells)} |"


@torch.inference_mode()
def main(rounds: int | None, device: str, limit: float) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device.startswith("cuda")
    half = torch.bfloat16 if cuda and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    dtype = half if cuda else torch.float32
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    rounds = rounds or ROUNDS["cuda" if cuda else "cpu"]
    torch.manual_seed(0)
    model = GPT2(LAYERS, WIDTH, HEADS, VOCABULARY, POSITIONS).to(device, dtype)
    print(f"{where}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, {rounds} rounds\n")
    print(
        "| batch x length | size | method | parameters | ms | added | paper, ms | paper, added |\n" + "|---" * 8 + "|"
    )
    token_ms = 0.0
    for setting in PAPER:
        batch, length, budget = setting
        expected = token_ms * batch * length / 1e3
        if expected > limit:
            print(f"| {batch} x {length} | {budget} | skipped: about {expected:.0f} s a forward (--limit {limit:g}) |")
            continue
        extras = make_extras(model, budget)
        tokens = torch.randint(VOCABULARY, (batch, length), device=device)
        times = measure(model, extras, tokens, rounds)
        token_ms = min(times[MERGED]) / (batch * length)
        print("\n".join(rows(setting, extras, times)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="rounds (100 on CUDA as in the paper, 10 on a CPU)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds: skip where one forward takes longer")
    arguments = parser.parse_args()
    main(arguments.trials, arguments.device, arguments.limit)
