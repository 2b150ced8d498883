"""Hold whole merges against fractions, code for code, on weights and factors made to be hard; then take them back.

The models are tiny, of every type, and their layers hold ties, sums beside ties, subnormal numbers, cancellations and
the largest numbers. `fractions_oracle.py` says what each weight must become.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction as F
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import spread
from lib.oracles.fractions_oracle import (
    FORMATS,
    Add,
    DoRA,
    Refused,
    Replace,
    Update,
    codes,
    count_wrong,
    low_rank,
    merge_codes,
    real_of,
    root,
    round_to_code,
    stacked,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAMES = {E4M3: "e4m3", E5M2: "e5m2", BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
PREFIX = "base_model.model."
KEPT = (FP64, E4M3, E5M2)  # to which --dtype casts nothing


@dataclass(frozen=True)
class Factors:
    """A layer and the factors of its update, W' = RN(W + alpha / r * B @ A)."""

    W: Tensor  # (m, n)
    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.A)


def stored(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype)


def flipped(x: Tensor, dim: int) -> Tensor:
    """Return a tensor turned around, of 8 bits too, for which torch has few functions."""
    return x.flip(dim) if x.itemsize > 1 else x.view(torch.uint8).flip(dim).view(x.dtype)


def plus_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.zeros_like(x), x)


def from_codes(values: Any, dtype: torch.dtype) -> Tensor:
    """Return the tensor that has these bits."""
    size = FORMATS[dtype].bits // 8
    return torch.from_numpy(np.array(values, dtype=f"u{size}").view(f"{'u' if size == 1 else 'i'}{size}")).view(dtype)


def random_codes(g: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype) -> Tensor:
    """Return numbers of random bits, with what the output could not hold put among the subnormal ones."""
    form, to = FORMATS[dtype], FORMATS[out]
    largest = real_of(to.end - 1, to) or F(0)
    found = [int(x) % (1 << form.bits) for x in g.integers(0, 1 << 63, math.prod(shape))]
    for at, code in enumerate(found):
        number = real_of(code, form)
        if number is not None and abs(number) * 4 > largest:
            found[at] &= form.sign | ((1 << (form.digits - 1)) - 1)
    return from_codes(found, dtype).reshape(shape)


def two_ranks(
    g: np.random.Generator, rows: Any, steps: Any, near: Any, unit: float, factor: torch.dtype, far: int = 22
) -> tuple[Tensor, Tensor, float]:
    """Return (A, B, alpha) with the change rows * unit * (steps + near * 2**-(16 + 2 far)), every factor exact."""
    B = np.stack([2.0**8 * rows, 2.0**-far * rows], 1)
    A = np.stack([2.0**8 * steps, 2.0**-far * near])
    return stored(A, factor), stored(B, factor), 2 * unit * 2.0**-16


def hostile(base: torch.dtype, factor: torch.dtype, out: torch.dtype, seed: int = 0) -> dict[str, Factors]:
    """Return layers by what is hard about them; some of them overflow."""
    g = np.random.default_rng([seed, list(NAMES).index(base), list(NAMES).index(factor), list(NAMES).index(out)])
    form, to = FORMATS[base], FORMATS[out]
    M, N = 6, 10
    unit = 2.0 ** (1 - to.digits)  # the step of the output's numbers in [1, 2)
    grid = max(2.0 ** (1 - form.digits), unit / 2)  # of weights that half a step brings to a midpoint
    least = 2.0 ** max(form.least, to.least)
    lowest = 2.0 ** FORMATS[factor].least  # the least positive factor
    found: dict[str, Factors] = {}

    def normal(*shape: int, size: float = 1.0) -> Any:
        return g.standard_normal(shape) * size

    def integers(*shape: int, size: int = 6) -> Any:
        return g.integers(-size, size + 1, shape).astype(np.float64)

    def signs(*shape: int) -> Any:
        return g.choice([-1.0, 1.0], shape)

    def around_one() -> Any:
        """Numbers of `grid` in [1, 2), powers of two and their neighbours among them."""
        steps = g.integers(0, int(1 / grid), (M, N), endpoint=True).astype(np.float64)
        few = np.where(g.random((M, N)) < 0.5, g.integers(0, 3, (M, N)), 1 / grid - g.integers(0, 3, (M, N)))
        return signs(M, N) * (1 + np.where(g.random((M, N)) < 0.4, few, steps) * grid)

    for rank, divisor in ((1, 3), (5, 7), (16, 3)):
        A, B = stored(normal(rank, N), factor), stored(normal(M, rank, size=0.01), factor)
        found[f"rank{rank}"] = Factors(stored(normal(M, N, size=0.05), base), A, B, rank / divisor)
    rows = 2.0 ** g.integers(-2, 6, M)
    W = stored(around_one() * rows[:, None], base)
    for name, near, far in (("ties", 0 * integers(N), 22), ("nearties", integers(N, size=1), 22)):
        found[name] = Factors(W, *two_ranks(g, rows, integers(N, size=9), near, unit / 2, factor, far))
    if factor != FP16:
        made = two_ranks(g, rows, integers(N, size=9), integers(N, size=1), unit / 2, factor, 47)
        found["nearerties"] = Factors(W, *made)
    A, B = stored(integers(3, N), factor), stored(integers(M, 3), factor)
    found["thirds"] = Factors(stored(around_one(), base), A, B, unit / 2)  # sums of multiples of 3 come beside ties
    W = stored(integers(M, N, size=100) * least, base)
    A, B = stored(integers(2, N) / 2, factor), stored(integers(M, 2) / 2, factor)
    found["subnormal"] = Factors(W, A, B, 2 * least)
    W = stored(np.where(g.random((M, N)) < 0.3, signs(M, N) * 0.0, around_one()), base)
    found["tinyscale"] = Factors(W, stored(integers(2, N), factor), stored(integers(M, 2), factor), 2.0**-1069)
    found["tinyfactors"] = Factors(
        stored(normal(M, N), base),
        stored(normal(2, N) * (2.0**76 if factor == FP64 else 1.0), factor),
        stored(integers(M, 2) * lowest, factor),
        2 * min(1 / lowest / 256, 2.0**990),
    )
    small = 2.0**-12 if factor == FP16 else 2.0**-60
    A, B = stored(normal(4, N, size=small), factor), stored(normal(M, 4, size=small), factor)
    found["hugescale"] = Factors(stored(normal(M, N), base), A, B, small**-2 / 3)
    A, B = normal(3, N), normal(M, 3, size=0.1)
    A[:, ::3], B[::2] = 0, 0
    W = normal(M, N)
    W[g.random((M, N)) < 0.4] *= 0.0  # -0.0 among them
    special = stored(W, base)
    special[0, :6] = from_codes([form.end, form.end + form.sign, form.end + 1, -1 % (1 << form.bits)] * 2, base)[:6]
    found["special"] = Factors(special if form.has_inf else stored(W, base), stored(A, factor), stored(B, factor), 2.0)
    found["anybits"] = Factors(
        random_codes(g, (M, N), base, out), stored(normal(2, N), factor), stored(normal(M, 2), factor), 1.0
    )
    half = np.concatenate([normal(2, N)] * 2) * np.array([1, 1, -1, -1])[:, None]
    A, B = stored(half, factor), stored(np.concatenate([normal(M, 2)] * 2, 1)[:, [0, 1, 0, 1]], factor)
    found["nochange"] = Factors(stored(W, base), A, B, 4 / 3)
    for name, near in (("tozero", 0 * integers(N)), ("nearzero", integers(N, size=1))):
        rows, steps = integers(M, size=3), integers(N, size=3)
        made = two_ranks(g, rows, steps, near, 2.0**-5, factor)
        found[name] = Factors(stored(-np.outer(rows, steps) * 2.0**-5, base), *made)
    top = min(F(real_of(to.end - 1, to) or 0), F(real_of(form.end - 1, form) or 0))
    W = stored(signs(M, 1) * np.full((M, N), float(top)), base)
    rows, steps = W[:, 0].double().sign().numpy(), g.integers(-4, 2, N).astype(np.float64)
    step = 2.0 ** ((to.end >> (to.digits - 1)) - 1 + to.least - (0 if to.has_inf else -1))  # of the largest numbers
    below = np.where(steps == 1, -1.0, integers(N, size=1))
    found["largest"] = Factors(W, *two_ranks(g, rows, steps, below, step / 2, factor))
    found["overflow"] = Factors(W, *two_ranks(g, rows, np.ones(N), 0 * below, step / 2, factor))
    return found


@dataclass(frozen=True)
class Change:
    """One adapter's update of one tensor of a model, as it is stored and as the oracle has it."""

    adapter: int
    tensors: Mapping[str, Tensor]  # by what follows PREFIX
    update: Update
    pattern: str = ""  # the module whose rank and alpha follow
    rank: int = 1
    alpha: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One tensor of a model, and its updates."""

    name: str
    W: Tensor
    changes: Sequence[Change] = ()

    def wanted(self, out: torch.dtype) -> list[int] | None:
        return merge_codes(self.W, out, [change.update for change in self.changes])


@dataclass(frozen=True)
class Model:
    """A base and its adapters."""

    layers: Sequence[Layer]
    weights: Sequence[float] = (1.0,)  # of each adapter
    fields: Sequence[Mapping[str, Any]] = ({},)  # of each adapter's config
    config: Mapping[str, Any] | None = None  # the base's

    def write(self, folder: Path) -> tuple[Path, list[tuple[Path, float]]]:
        """Write all files; return the base's path and the adapters' paths with their weights."""
        base = folder / "base"
        base.mkdir(parents=True)
        save_file(
            {layer.name: layer.W.clone().contiguous() for layer in self.layers},
            base / "model.safetensors",
            {"format": "pt"},
        )
        if self.config:
            (base / "config.json").write_text(json.dumps(self.config))
        adapters = []
        for number, (weight, fields) in enumerate(zip(self.weights, self.fields, strict=True)):
            changes = [change for layer in self.layers for change in layer.changes if change.adapter == number]
            tensors = {PREFIX + name: tensor for change in changes for name, tensor in change.tensors.items()}
            patterns = {
                "rank_pattern": {change.pattern: change.rank for change in changes if change.pattern},
                "alpha_pattern": {change.pattern: change.alpha for change in changes if change.pattern},
            }
            path = folder / f"adapter{number}"
            path.mkdir()
            save_file(
                {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
                path / "adapter_model.safetensors",
            )
            written = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **patterns, **fields}
            (path / "adapter_config.json").write_text(json.dumps(written))
            adapters += [(path, weight)] if tensors else []
        return base if self.config else base / "model.safetensors", adapters


def placed(case: Factors, layout: str) -> tuple[Tensor, dict[str, Tensor], list[F]]:
    """Return W as it is stored in a layout, the adapter's tensors and scale * B @ A as W is stored."""
    plain = {"lora_A.weight": case.A, "lora_B.weight": case.B}
    if layout == "linear":
        return case.W, plain, low_rank(case.A, case.B, case.scale)
    if layout == "conv":
        W, A = (x.reshape(len(x), -1, 2, 1) for x in (case.W, case.A))
        return W, {"lora_A.weight": A, "lora_B.weight": case.B[:, :, None, None]}, low_rank(A, case.B, case.scale)
    D = low_rank(case.A, case.B, case.scale, transposed=True)
    if layout == "embedding":
        return case.W.T.contiguous(), {"lora_embedding_A": case.A, "lora_embedding_B": case.B}, D
    return case.W.T.contiguous(), plain, D  # Conv1D


LAYOUTS = ("linear", "Conv1D", "conv", "embedding")


def layer_of(name: str, case: Factors, layout: str, adapter: int = 0, weight: float = 1.0) -> Layer:
    """Return the layer of a case under one additive update."""
    W, tensors, D = placed(case, layout)
    named = {f"{name}.{end}": tensor for end, tensor in tensors.items()}
    change = Change(adapter, named, Add(D, weight), name, len(case.A), case.alpha)
    return Layer(f"{name}.weight", W, [change])


def fits(layer: Layer, out: torch.dtype) -> bool:
    return layer.wanted(out) is not None


def plain(cases: Mapping[str, Factors]) -> Model:
    """Return a model with each case in two of the layouts of a weight, by turns."""
    turns = itertools.cycle(LAYOUTS)
    return Model([layer_of(f"{name}{i}", case, next(turns)) for name, case in cases.items() for i in (0, 1)])


def several(cases: Mapping[str, Factors]) -> Model:
    """Return a model under three adapters, whose changes together are near a case's own, or cancel."""
    weights = (1 / 3, -0.7, 1.0)
    layers = []
    for (name, case), layout in zip(cases.items(), itertools.cycle(LAYOUTS), strict=False):
        mixed = Factors(case.W, case.A.flip(1), case.B, case.alpha * 2.0**-40)
        shares = [Factors(case.W, case.A, case.B, case.alpha * 3), mixed, mixed]
        parts = [layer_of(name, x, layout, i, w) for i, (x, w) in enumerate(zip(shares, weights, strict=True))]
        layers.append(Layer(f"{name}.weight", parts[0].W, [c for part in parts for c in part.changes]))
    case = cases["rank1"]
    shares = [Factors(case.W, case.A, case.B, 0.7), Factors(case.W, case.A, case.B, 1 / 3)]  # c = 0.7 / 3, twice
    parts = [layer_of("cancel", x, "linear", i, weights[i]) for i, x in enumerate(shares)]
    layers.append(Layer("cancel.weight", case.W, [c for part in parts for c in part.changes]))
    return Model(layers, weights, ({}, {}, {}))


def dora(cases: Mapping[str, Factors], factor: torch.dtype, out: torch.dtype, weight: float) -> Model:
    """Return a model under DoRA, and a second adapter's additive update on half of its tensors."""
    layers = []
    even = Factors(*(x.abs() if name == "W" else x for name, x in vars(cases["rank5"]).items()))
    W = even.W.clone()
    W[1], W[:, 2] = 0, 0
    B, A = even.B.clone(), even.A.clone()
    B[1], A[:, 2] = 0, 0
    made = {"even": even, "zeros": Factors(W, A, B, even.alpha)}
    made |= {name: case for name, case in cases.items() if name not in ("largest", "hugescale", "tinyfactors")}
    made = {name: Factors(plus_zero(case.W), case.A, case.B, case.alpha) for name, case in made.items()}  # without -0.0
    for number, ((name, case), layout) in enumerate(zip(made.items(), itertools.cycle(LAYOUTS), strict=False)):
        W, tensors, D = placed(case, layout)
        by_columns = layout in ("Conv1D", "embedding")
        size = case.W.double().norm(dim=1)
        ratio = torch.tensor([1.0, 1.1, -0.5, 0.0, 2.0, 1 / 3], dtype=FP64)
        magnitude = (size * ratio).clamp(-6e4, 6e4).to(factor)
        named = {f"{name}.{end}": tensor for end, tensor in tensors.items()} | {
            f"{name}.lora_magnitude_vector": magnitude
        }
        update = DoRA(D, magnitude, weight, by_columns)
        changes = [Change(0, named, update, name, len(case.A), case.alpha)]
        if number % 2:
            beside = Factors(case.W, case.A.flip(1), case.B, case.alpha / 3)
            changes += layer_of(name, beside, layout, 1, -0.7).changes
        layers.append(Layer(f"{name}.weight", W, changes))
    layers.append(pythagoras(case.W.dtype, out, weight))
    return Model(layers, (weight, -0.7), ({"use_dora": True}, {}))


def pythagoras(base: torch.dtype, out: torch.dtype, weight: float) -> Layer:
    """Return rows whose norm is 5 and whose change is 0, scaled so that they become ties."""
    W, A, B = stored([[3, 4, 0], [4, 0, -3]], base), torch.ones(1, 3, dtype=FP32), torch.zeros(2, 1, dtype=FP32)
    step = 2.0 ** (1 - FORMATS[out].digits)
    magnitude = stored([5 * (1 + step), 5 * (1 - step)], FP64)
    named = {"five.lora_A.weight": A, "five.lora_B.weight": B, "five.lora_magnitude_vector": magnitude}
    return Layer("five.weight", W, [Change(0, named, DoRA(low_rank(A, B, 1.0), magnitude, weight), "five")])


def values(base: torch.dtype, factor: torch.dtype, out: torch.dtype, weight: float) -> Model:
    """Return biases with additions, replaced tensors and replaced rows, with a second adapter's addition on some."""
    cases = hostile(base, factor, out, seed=1)
    ones = torch.ones(1, 1, dtype=factor)
    layers = []
    for name in ("rank1", "ties", "subnormal", "anybits", "special"):
        case = cases[name]
        W, V = case.W[:, 0].clone(), flipped(case.W, 1)[:, 1].double()
        V = torch.where(V.isfinite(), V, 1.0).to(factor)
        V = torch.where(V.isfinite() & (V != 0), V, 1.0)
        bias = case.B[:, 0] if name != "anybits" else V
        factors = {f"{name}.lora_A.weight": ones, f"{name}.lora_B.weight": torch.zeros(6, 1, dtype=factor)}
        added = Change(
            0,
            {**factors, f"{name}.lora_B.bias": bias},
            Add(low_rank(ones, bias[:, None], case.scale), weight),
            name,
            1,
            case.scale,
        )
        layers.append(Layer(f"{name}.bias", W, [added]))
        matrix = torch.zeros(6, 1, dtype=base)
        layers.append(Layer(f"{name}.weight", matrix, [Change(0, {}, Add([F(0)] * 6, weight))]))
        layers.append(Layer(f"{name}norm.weight", W, [Change(0, {f"{name}norm.weight": V}, Replace(V, weight))]))
        rows = torch.stack([V, V.flip(0)])
        table = case.W.T.contiguous()  # (10, 6)
        replaced = Change(
            0, {f"{name}tokens.token_adapter.trainable_tokens_delta": rows}, Replace(rows, weight, ROWS[name])
        )
        layers.append(Layer(f"{name}tokens.weight", table, [replaced]))
        beside = layer_of(f"{name}both", case, "embedding", 1, -0.7)
        replaced = Change(
            0, {f"{name}both.token_adapter.trainable_tokens_delta": rows}, Replace(rows, weight, ROWS[name])
        )
        layers.append(Layer(f"{name}both.weight", beside.W, [replaced, *beside.changes]))
    indices = {f"{name}{end}": rows for name, rows in ROWS.items() for end in ("tokens", "both")}
    return Model(layers, (weight, -0.7), ({"lora_bias": True, "trainable_token_indices": indices}, {}))


ROWS = {"rank1": [3, 0], "ties": [0, 9], "subnormal": [4, 5], "anybits": [8, 2], "special": [1, 0]}


def experts(cases: Mapping[str, Factors]) -> Model:
    """Return a model of stacks of three experts, half of them stored as (experts, in, out), under two adapters."""
    layers = []
    weights = (1 / 3, 1.0)
    for number, case in enumerate(cases.values()):
        shared = f"model.layers.{number}.mlp.experts"
        W = torch.stack([case.W, flipped(case.W, 0), flipped(case.W, 1)])
        W = W.mT.contiguous() if number % 2 else W
        changes = []
        for adapter, weight in enumerate(weights):
            A = torch.cat([case.A, case.A.flip(1), case.A])
            B = torch.stack([case.B, case.B.flip(0), case.B], 2).flatten(1)  # for each rank the experts
            alpha = case.alpha * (3.0, 2.0**-40)[adapter]
            D = stacked(A, B, alpha / len(case.A), 3, bool(number % 2))
            named = {f"{shared}.lora_A.weight": A, f"{shared}.lora_B.weight": B}
            pattern = rf"{number}\.mlp\.experts\.down_proj"
            changes.append(Change(adapter, named, Add(D, weight), pattern, len(case.A), alpha))
        layers.append(Layer(f"{shared}.down_proj", W, changes))
    fields = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": [], "peft_version": "0.19.0"}
    return Model(layers, weights, (fields, fields), {"model_type": "mixtral"})


KINDS = ("plain", "several", "dora", "values", "experts")


def model_of(kind: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype, weight: float = 1.0) -> Model:
    """Return the model of a kind of updates, without what overflows; `weight`: of those that are not additive."""
    cases = hostile(base, factor, out)
    if kind == "values":
        made = values(base, factor, out, weight)
    elif kind == "dora":
        made = dora(cases, factor, out, weight)
    else:
        made = {"plain": plain, "several": several, "experts": experts}[kind](cases)
    kept = [layer for layer in made.layers if fits(layer, out)]
    return Model(kept, made.weights, made.fields, made.config)


def wrong_layers(model: Model, out: torch.dtype, folder: Path) -> list[str]:
    """Merge a model, and unmerge it where its type was kept; return what is not as defined."""
    keeps = all(layer.W.dtype == out for layer in model.layers)
    base, adapters = model.write(folder)
    merged = folder / ("merged" if model.config else "merged.safetensors")
    loratool.merge(base, adapters, merged, dtype="keep" if out in KEPT else NAMES[out], undo=keeps)
    found = load_file(merged / "model.safetensors" if model.config else merged)
    wrong = []
    for layer in model.layers:
        wanted = layer.wanted(out)
        assert wanted is not None and found[layer.name].dtype == out
        count = count_wrong(found[layer.name], wanted)
        wrong += [f"{layer.name}: {count} of {len(wanted)}"] if count else []
    if keeps:
        back = folder / ("back" if model.config else "back.safetensors")
        loratool.unmerge(merged, adapters, back)
        names = ("model.safetensors", "config.json") if model.config else ("",)
        same = all((back / name).read_bytes() == (base / name).read_bytes() for name in names)
        wrong += [] if same else ["the base did not come back"]
    return wrong


def id_of(value: object) -> str:
    return (
        NAMES[value] if isinstance(value, torch.dtype) else f"{value:.3g}" if isinstance(value, float) else str(value)
    )


# kind, the base's type, the factors', the output's, the weight of an update that is not additive
SOME = [
    ("plain", BF16, FP32, BF16, 1.0),
    ("plain", FP16, FP16, FP16, 1.0),
    ("plain", FP32, BF16, FP32, 1.0),
    ("plain", FP64, FP64, FP64, 1.0),
    ("plain", BF16, FP64, FP32, 1.0),
    ("plain", E4M3, FP32, FP16, 1.0),
    ("plain", E4M3, FP32, E4M3, 1.0),
    ("plain", E5M2, BF16, E5M2, 1.0),
    ("several", BF16, FP32, BF16, 1.0),
    ("several", FP32, FP16, FP32, 1.0),
    ("several", FP64, FP32, FP16, 1.0),
    ("dora", BF16, FP32, BF16, 1.0),
    ("dora", FP16, BF16, FP16, -0.7),
    ("dora", FP32, FP32, FP32, 0.5),
    ("dora", FP32, BF16, BF16, 1.0),
    ("dora", E4M3, BF16, E4M3, 0.5),
    ("values", E4M3, BF16, E4M3, -0.7),
    ("values", BF16, FP32, BF16, 0.5),
    ("values", FP16, FP32, FP16, 1.0),
    ("values", FP32, BF16, FP32, -0.7),
    ("values", FP64, FP64, FP64, 1 / 3),
    ("experts", BF16, FP32, BF16, 1.0),
]
WEIGHTS = {"dora": (1.0, 0.5, -0.7), "values": (1.0, 0.5, -0.7, 1 / 3)}
OUTPUTS = {
    base: (BF16, FP16, FP32, *((base,) if base in KEPT else ())) for base in (BF16, FP16, FP32, FP64, E4M3, E5M2)
}
EVERY = [
    (kind, base, factor, out, weight)
    for base, outputs in OUTPUTS.items()
    for factor, out in itertools.product((BF16, FP16, FP32, FP64), outputs)
    for kind in (("plain", "several") if base in (E4M3, E5M2) and base != out else KINDS)
    for weight in WEIGHTS.get(kind, (1.0,))
]
SETTINGS = ("kind", "base", "factor", "out", "weight")


@pytest.mark.parametrize(SETTINGS, spread(SOME, 7), ids=id_of)
def test_merges_round_the_exact_real_once(
    tmp_path: Path, kind: str, base: Any, factor: Any, out: Any, weight: Any
) -> None:
    """Each layer of a model is hard in its own way; with undo the base's file comes back byte for byte."""
    assert wrong_layers(model_of(kind, base, factor, out, weight), out, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(SETTINGS, [each for each in EVERY if each not in SOME], ids=id_of)
def test_merges_of_every_type_round_once(
    tmp_path: Path, kind: str, base: Any, factor: Any, out: Any, weight: Any
) -> None:
    assert wrong_layers(model_of(kind, base, factor, out, weight), out, tmp_path) == []


def check_refusals(tmp_path: Path, base: torch.dtype, factor: torch.dtype, out: torch.dtype) -> int:
    """Merge each layer that overflows, alone; return how many there are."""
    layers = [layer_of(name, case, "linear") for name, case in hostile(base, factor, out).items()]
    refused = [layer for layer in layers if not fits(layer, out)]
    for layer in refused:
        path, adapters = Model([layer]).write(tmp_path / layer.name)
        with pytest.raises((InputError, NeedsFlag), match="infinite|beyond the largest"):
            loratool.merge(
                path, adapters, tmp_path / "out.safetensors", dtype="keep" if out in KEPT else NAMES[out], undo=False
            )
        assert not (tmp_path / "out.safetensors").exists()
    return len(refused)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64, E4M3, E5M2], ids=id_of)
def test_what_would_become_infinite_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """A sum halfway between the largest number and the next that there is not rounds to inf, one below it does not."""
    assert check_refusals(tmp_path, dtype, FP32, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "factor", "out"), sorted({each[1:4] for each in EVERY}, key=str), ids=id_of)
def test_what_would_become_infinite_in_any_type_is_refused(tmp_path: Path, base: Any, factor: Any, out: Any) -> None:
    check_refusals(tmp_path, base, factor, out)


@pytest.mark.parametrize("rank", [32, 64, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=id_of)
def test_high_ranks(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    """Most terms cancel, so that the sum is small beside them."""
    g = np.random.default_rng(rank)
    A, B = g.standard_normal((rank, 5)), g.standard_normal((3, rank))
    A[1::2] = A[::2] * (1 + 2.0**-10 * (g.random((rank // 2, 5)) < 0.1))
    B[:, 1::2] = -B[:, ::2]
    case = Factors(stored(g.standard_normal((3, 5)), dtype), stored(A, BF16), stored(B, FP32), rank / 7)
    assert wrong_layers(Model([layer_of("x", case, "linear")]), dtype, tmp_path) == []


def zeros(kind: str, dtype: torch.dtype, weight: float) -> Layer:
    """Return a layer of seven weights with sums, changes and new values that are zero, or too small for the type."""
    W = stored([[-0.0, 0.0, -0.0, 0.0, 1.0, -1.0, 3.0]], dtype)
    if kind in ("lora", "dora"):
        A = stored([[0, 0, 2.0**-500, -(2.0**-500), 0, 0, 0], [0, 0, 0, 0, -1, 1, 0]], FP64)
        case = Factors(W, A, stored([[2.0**-600, 1]], FP64), 2.0)
        layer = layer_of("x", case, "linear")
        if kind == "lora":
            return layer
        update = DoRA(low_rank(case.A, case.B, 1.0), stored([2], FP32))
        tensors = {**layer.changes[0].tensors, "x.lora_magnitude_vector": update.magnitude}
        return Layer(layer.name, W, [Change(0, tensors, update, "x", 2, 2.0)])
    V = stored([[-0.0, -0.0, 0.0, 0.0, -0.0, -0.0, 1.0]], dtype)
    if kind.endswith("rows"):
        tensors = {"x.token_adapter.trainable_tokens_delta": V}
        return Layer("x.weight", W, [Change(0, tensors, Replace(V, weight, [0]))])
    return Layer("x.weight", W, [Change(0, {"x.weight": V}, Replace(V, weight))])


@pytest.mark.parametrize("kind", ["lora", "dora", "replace", "half replace", "rows", "half rows"])
@pytest.mark.parametrize("dtype", [BF16, FP64], ids=id_of)
def test_the_sign_of_zero(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    """Without a change W keeps it, a sum that is zero is +0.0, a new value keeps its own."""
    special: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "rows": {"trainable_token_indices": {"x": [0]}},
    }
    fields = special.get(kind.split()[-1], {})
    weight = 0.5 if kind.startswith("half") else 1.0
    assert wrong_layers(Model([zeros(kind, dtype, weight)], [weight], [fields]), dtype, tmp_path) == []


def test_a_norm_of_what_is_no_number_is_refused(tmp_path: Path) -> None:
    W = torch.ones(2, 3, dtype=FP32)
    W[0, 1] = math.inf
    A, B, m = torch.ones(1, 3, dtype=FP32), torch.ones(2, 1, dtype=FP32), torch.ones(2, dtype=FP32)
    tensors = {"x.lora_A.weight": A, "x.lora_B.weight": B, "x.lora_magnitude_vector": m}
    layer = Layer("x.weight", W, [Change(0, tensors, DoRA(low_rank(A, B, 1.0), m), "x")])
    assert not fits(layer, FP32)
    path, adapters = Model([layer], fields=[{"use_dora": True}]).write(tmp_path)
    with pytest.raises(InputError, match=r"x\.weight"):
        loratool.merge(path, adapters, tmp_path / "out.safetensors")


@pytest.mark.parametrize("layout", ["linear", "Conv1D"])
@pytest.mark.parametrize(
    ("size", "fits"), [(-1070, True), (-1060, True), (-1039, True), (-1034, True), (1016, True), (1022, False)]
)
def test_norms_near_the_ends_of_float64(tmp_path: Path, size: int, fits: bool, layout: str) -> None:
    """Too small ones are not: such rows merge by the definition, and come back."""
    g = np.random.default_rng(0)
    W, A, B = (
        stored(np.ldexp(g.uniform(1, 2, shape), e), FP64)
        for shape, e in (((6, 10), size), ((2, 10), 0), ((6, 2), size - 4))
    )
    whole, tensors, D = placed(Factors(W, A, B, 1.0), layout)
    m = stored(g.standard_normal(6), FP64)
    tensors = {f"x.{end}": tensor for end, tensor in tensors.items()} | {"x.lora_magnitude_vector": m}
    update = DoRA(D, m, by_columns=layout == "Conv1D")
    model = Model([Layer("x.weight", whole, [Change(0, tensors, update, "x", 2, 1.0)])], fields=[{"use_dora": True}])
    if fits:
        assert wrong_layers(model, FP64, tmp_path) == []
        return
    base, adapters = model.write(tmp_path)
    with pytest.raises(InputError, match=r"x\.weight: has a row or column whose norm.* beyond float64"):
        loratool.merge(base, adapters, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


class TestOracle:
    """The oracle itself, against casts of numpy and torch and values that are known."""

    @pytest.mark.parametrize("out", [BF16, FP16, FP32], ids=id_of)
    def test_casts(self, out: torch.dtype) -> None:
        """numpy casts float64 and torch float32 to the nearest, ties to even; neither goes by way of another type."""
        g = np.random.default_rng(0)
        x = g.standard_normal(3000) * 2.0 ** g.integers(-30, 12, 3000)
        x[::3] = x[::3].astype(np.float16) + 2.0**-12  # ties of float16, of its subnormals too
        if out == BF16:
            given = torch.from_numpy(x.astype(np.float32))
            wanted = given.to(BF16)
        else:
            given = torch.from_numpy(x)
            wanted = torch.from_numpy(x.astype({FP16: np.float16, FP32: np.float32}[out]))
        assert merge_codes(given[:, None], out) == codes(wanted)

    @pytest.mark.parametrize("dtype", [E4M3, E5M2, BF16, FP16], ids=id_of)
    def test_every_code_of_a_short_type(self, dtype: torch.dtype) -> None:
        """torch widens every one exactly, and the way back is the same code."""
        x = from_codes(range(0, 1 << FORMATS[dtype].bits, 1 if dtype.itemsize == 1 else 31), dtype)
        wide = x.float()
        x, wide = x[wide == wide][:, None], wide[wide == wide][:, None]
        assert merge_codes(x, FP32) == codes(wide) and merge_codes(wide, dtype) == codes(x)

    def test_known_values(self) -> None:
        f16, f32 = FORMATS[FP16], FORMATS[FP32]
        assert round_to_code(F(1, 3), f32) == 0x3EAAAAAB and round_to_code(F(-1, 3), f32) == 0xBEAAAAAB
        assert round_to_code(1 + F(1, 2**24), f32) == 0x3F800000  # ties, to the even one
        assert round_to_code(1 + F(3, 2**24), f32) == 0x3F800002
        assert round_to_code(1 + F(1, 2**24) + F(1, 2**200), f32) == 0x3F800001
        assert round_to_code(1 - F(1, 2**25), f32) == 0x3F800000  # below a power of two the steps are half as long
        assert round_to_code(F(1, 2**150), f32) == 0 and round_to_code(F(-1, 2**150), f32) == 0x80000000
        assert round_to_code(F(3, 2**151), f32) == 1
        assert round_to_code(F(65519), f16) == 0x7BFF and real_of(0x7BFF, f16) == 65504
        for x, form in ((65520, f16), (465, FORMATS[E4M3]), (61440, FORMATS[E5M2]), (2**128, FORMATS[BF16])):
            with pytest.raises(Refused):
                round_to_code(F(x), form)
        assert round_to_code(F(464), FORMATS[E4M3]) == 0x7E and round_to_code(F(61439), FORMATS[E5M2]) == 0x7B

    def test_roots(self) -> None:
        assert root(F(25)) == 5 and root(F(0)) == 0 and root(F(1, 4**600)) == F(1, 2**600)
        assert root((2**35 + F(1, 2)) ** 2) == 2**35 + 1 and root((2**35 + F(3, 2)) ** 2) == 2**35 + 2  # half up
        assert root((2**36 - F(1, 2)) ** 2) == 2**36
        assert float(root(F(2))) == round(math.sqrt(2) * 2**35) / 2**35
