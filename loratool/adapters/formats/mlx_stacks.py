"""Fuse MLX's stacks of experts' factors into those of the class's parameter, and split them again.

MLX stores A as (expert, r, in), in older files as (expert * r, in), and B as (expert, out, r). Gate and up have a pair
each, while the class has one parameter for both. The parameter's A is their common A if they are equal, else one after
the other. Numbers are only moved. Defined by mlx-lm: `LoRASwitchLinear` in `mlx_lm/tuner/lora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..placed_factors import Place, have_one_A, lay_A, lay_B, place_A, place_B, starts
from .made_tensors import MadeTensor, copied, made_of_bits, stored_bits

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits


@dataclass(frozen=True)
class StackLayout:
    """The place of one of MLX's stacks in the class's parameter."""

    part: int = 0
    parts: int = 1
    interleaved: bool = False  # rows part, part + parts, ... of each matrix; else an equal share of them
    transposed: bool = False  # the parameter is (expert, in, out), and PEFT takes it for (expert, out, in)


@dataclass(frozen=True)
class MlxPair:
    """The factors of one of MLX's stacks."""

    file: WeightsFile
    A: str
    B: str
    experts: int
    rank: int
    rows: int  # out
    width: int  # in

    @staticmethod
    def of(module: str, roles: Mapping[str, str], file: WeightsFile) -> MlxPair:
        """Return the pair of a module's tensors; raise InputError if they are not a pair."""
        if roles.keys() != {"A", "B"}:
            raise InputError("is a stack, which can have only lora_a and lora_b", culprit=module)
        A, B = (file.specs[roles[role]].shape for role in "AB")
        E, rows, rank = B if len(B) == 3 else (0, 0, 0)
        width = A[-1] if A else 0
        if 0 in (E, rows, rank, width) or A not in ((E, rank, width), (E * rank, width)):
            raise InputError(f"lora_a is {A} and lora_b is {B}: not a stack of low-rank pairs", culprit=module)
        return MlxPair(file, roles["A"], roles["B"], E, rank, rows, width)


@dataclass(frozen=True)
class JoinedStack:
    """The factors of a parameter; MLX stores each share of it as a separate stack, or not at all."""

    pairs: Mapping[int, MlxPair]  # by number of the share
    layout: StackLayout  # of the first
    shares_A: bool  # all have the same A

    @staticmethod
    def of(stack: str, pairs: Mapping[int, MlxPair], layout: StackLayout) -> JoinedStack:
        """Fuse the pairs; raise InputError if they are not of one parameter."""
        first, *others = pairs.values()
        for other in others:
            if (other.experts, other.rows, other.width) != (first.experts, first.rows, first.width):
                raise InputError(f"and {first.B} are both of {stack}, but have different sizes", culprit=other.B)
        dtypes = {pair.file.specs[name].dtype for pair in pairs.values() for name in (pair.A, pair.B)}
        if len(dtypes) > 1:
            raise InputError(f"has factors of several types, {' and '.join(sorted(dtypes))}", culprit=stack)
        return JoinedStack(pairs, layout, have_one_A(first.file, [pair.A for pair in pairs.values()]))

    @property
    def rank(self) -> int:
        (first, *_) = self.pairs.values()
        return first.rank if self.shares_A else sum(pair.rank for pair in self.pairs.values())

    @property
    def experts(self) -> int:
        return next(iter(self.pairs.values())).experts

    def specs(self) -> dict[str, TensorSpec]:
        """Return the type and shape of A (E * r, in) and B (out, r * E) in PEFT's layout."""
        (first, *_) = self.pairs.values()
        count, spec = self.rank * self.experts, first.file.specs[first.A]
        sides = first.rows * self.layout.parts, first.width
        out, width = sides[::-1] if self.layout.transposed else sides
        return {"A": replace(spec, shape=(count, width)), "B": replace(spec, shape=(out, count))}

    def made(self, names: Mapping[str, str]) -> dict[str, MadeTensor]:
        """Return A and B in PEFT's layout, under these names by role."""
        specs = self.specs()
        return {name: made_of_bits(specs[role], partial(self.load, role)) for role, name in names.items()}

    def load(self, role: str) -> Bits:
        """Return the bits of A or B in PEFT's layout."""
        from ...numerics.linalg import adjoint

        (first, *_), E = self.pairs.values(), self.experts
        firsts = starts([pair.rank for pair in self.pairs.values()], self.shares_A)
        places = [
            (pair, Place(start, _rows(replace(self.layout, part=part), pair.rows)))
            for (part, pair), start in zip(self.pairs.items(), firsts, strict=True)
        ]
        if (role == "A") is not self.layout.transposed:
            sides = ((stored_bits(copied(p.file, p.A)).reshape(E, p.rank, -1), place) for p, place in places)
            side = place_A(sides, (E, self.rank, first.width))
        else:
            sides = ((stored_bits(copied(p.file, p.B)), place) for p, place in places)
            side = adjoint(place_B(sides, (E, first.rows * self.layout.parts, self.rank)))  # (E, r, out)
        return lay_A(side) if role == "A" else lay_B(adjoint(side))


def cut_share(A: Numbers, B: Numbers, experts: int, layout: StackLayout) -> tuple[Numbers, Numbers]:
    """Return a share's factors, A (E, r, in) and B (E, out, r), from those of the parameter in PEFT's layout."""
    from ...numerics.linalg import adjoint

    rank = len(A) // experts
    rank_side = A.reshape(experts, rank, -1)
    other = B.reshape(len(B), rank, experts).T  # (E, r, out)
    inputs, outputs = (other, rank_side) if layout.transposed else (rank_side, other)
    rows = outputs.shape[2] // layout.parts
    return inputs, replace(outputs, bits=adjoint(outputs.bits[:, :, _rows(layout, rows)]))


def share_sides(A: tuple[int, ...], B: tuple[int, ...], layout: StackLayout) -> tuple[int, int]:
    """Return (in, out) of a share of factors of these shapes."""
    width, out = (B[0], A[1]) if layout.transposed else (A[1], B[0])
    return width, out // layout.parts


def share_ranks(A: Numbers, B: Numbers, experts: int, layouts: Sequence[StackLayout]) -> list[list[int]]:
    """Return the ranks that each share needs.

    If no rank is used by two shares, as in fused factors, each share gets all ranks that no other share uses. Else, and
    for factors of zeros, each gets all ranks.
    """
    import numpy as np

    used = np.stack([abs(cut_share(A, B, experts, each)[1]).bits.any((0, 1)) for each in layouts])  # (shares, r)
    apart = bool(used.any()) and not bool((used.sum(0) > 1).any())
    needed = ~(used.any(0) & ~used) if apart else np.ones_like(used)
    return [np.flatnonzero(each).tolist() for each in needed]


def _rows(layout: StackLayout, rows: int) -> slice:
    if layout.interleaved:
        return slice(layout.part, None, layout.parts)
    return slice(layout.part * rows, (layout.part + 1) * rows)
