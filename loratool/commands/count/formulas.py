"""Formulas for the parameters that each method of the LoRA paper trains, and for what it adds at inference.

The counts are the formulas of section 5.1 of Hu et al. 2021 (arXiv 2106.09685), with d the width of a block, L the
number of blocks and n the chosen size: LoRA's rank, an adapter's bottleneck, the length of a prefix, a number of
layers.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CountedMatrix:
    """A matrix that LoRA changes, or some rows of a fused one."""

    name: str
    inp: int
    out: int
    copies: int = 1  # how many it stacks, experts for one

    @property
    def cost(self) -> int:
        """The parameters that one rank takes."""
        return self.copies * (self.inp + self.out)


@dataclass(frozen=True)
class Outline:
    """The numbers of a model that the formulas need."""

    total: int  # parameters
    biases: int  # numbers in bias vectors, a head's not among them
    width: int  # of the token embedding's vectors as the blocks see them, 0 without blocks
    widths: tuple[int, ...]  # of each block that an adapter or prefix goes into
    layers: tuple[int, ...]  # parameters of each block of the largest stack, from the first
    context: int | None  # in positions, where it is known
    targets: tuple[CountedMatrix, ...]


@dataclass(frozen=True)
class Formula:
    """A row of FORMULAS."""

    title: str
    size: str  # what n is, empty if nothing is chosen
    count: Callable[[Outline, int], int]  # (model, n) -> trainable parameters
    adds: str  # what it adds at inference, in words
    needs: str = "no numbered blocks of one width were found"  # said instead of `adds` if nothing is trained
    largest: Callable[[Outline], int] = lambda model: sys.maxsize  # the size beyond which there is no more
    depth: Callable[[Outline], int] = lambda model: 0  # layers more that a token passes in sequence at inference
    positions: bool = False  # n positions of the context are taken


def _adapters(model: Outline, n: int) -> int:
    """Count one bottleneck per block: d x n, n x d and their biases."""
    return sum(2 * d * n + n + d for d in model.widths)


def _shared_adapter(model: Outline, n: int) -> int:
    """Count one bottleneck for all blocks of a width."""
    return sum(2 * d * n + n + d for d in set(model.widths))


def _blocks(model: Outline) -> int:
    return len(model.widths)


def _longest_prefix(model: Outline) -> int:
    return model.context - 1 if model.context else sys.maxsize


# name -> what it trains and adds
FORMULAS: dict[str, Formula] = {
    "full": Formula(
        "full fine-tuning",
        "",
        lambda model, n: model.total,
        "nothing, but each task needs a full model",
    ),
    "top-layers": Formula(
        "top layers",
        "layers",
        lambda model, n: sum(model.layers[-n:]),
        "nothing, but each task has its own last layers",
        largest=lambda model: len(model.layers),
    ),
    "bitfit": Formula(
        "BitFit",
        "",
        lambda model, n: model.biases,
        "nothing, but each task has its own biases",
        needs="the model has no biases",
    ),
    "prefix-embedding": Formula(
        "prefix-embedding",
        "prefix",
        lambda model, n: model.width * n,
        "{n} positions of the context{of}",
        largest=_longest_prefix,
        positions=True,
    ),
    "prefix-layer": Formula(
        "prefix-layer",
        "prefix",
        lambda model, n: sum(model.widths) * n,
        "{n} positions of the context{of}, in every layer",
        largest=_longest_prefix,
        positions=True,
    ),
    "adapter-houlsby": Formula(
        "adapters, Houlsby",
        "bottleneck",
        lambda model, n: 2 * _adapters(model, n),
        "{depth} adapter layers in sequence: two a block",
        depth=lambda model: 2 * _blocks(model),
    ),
    "adapter-lin": Formula(
        "adapters, Lin",
        "bottleneck",
        lambda model, n: _adapters(model, n) + 2 * sum(model.widths),
        "{depth} adapter layers in sequence, each with a LayerNorm",
        depth=_blocks,
    ),
    "adapter-pfeiffer": Formula(
        "adapters, Pfeiffer",
        "bottleneck",
        _adapters,
        "{depth} adapter layers in sequence: one a block",
        depth=_blocks,
    ),
    "adapterdrop": Formula(
        "AdapterDrop",
        "bottleneck",
        _adapters,
        "up to {depth} adapter layers in sequence: lower blocks can drop theirs",
        depth=_blocks,
    ),
    "adapterdrop-shared": Formula(
        "AdapterDrop, shared",
        "bottleneck",
        _shared_adapter,
        "up to {depth} passes of the one adapter in sequence",
        depth=_blocks,
    ),
    "lora": Formula(
        "LoRA",
        "rank",
        lambda model, n: n * sum(target.cost for target in model.targets),
        "nothing once merged",
        largest=lambda model: min((min(target.inp, target.out) for target in model.targets), default=0),
    ),
}

TOP_LAYERS = 2  # FT^Top2 of the paper's Table 3


def largest_size(method: Formula, model: Outline, budget: int) -> int:
    """Return the largest size whose count is within `budget` parameters. 0 if even the smallest is not."""
    at_most = min(budget, method.largest(model))
    return bisect_right(range(1, at_most + 1), budget, key=lambda n: method.count(model, n))
