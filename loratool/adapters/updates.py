"""Define the kinds of updates that an adapter can apply to one tensor, each a class and a row of `UPDATES`.

Any number of additive updates of a tensor is summed before a single rounding, so they give their factors as `terms`.
Of the other kinds a tensor takes at most one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..numerics.products import Term


@dataclass(frozen=True)
class Update:
    """An update with its tensors loaded, in any float dtype."""


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA: the delta is `scale * B @ A` (Hu et al., ICLR 2022, section 4.1).

    An embedding counts as a linear layer stored transposed: A is (r, vocabulary), B is (dimension, r).
    """

    A: Tensor  # (r, in), of a convolution (r, in, *kernel)
    B: Tensor  # (out, r), of a convolution (out, r, 1, ...)
    scale: float  # alpha / r, with rsLoRA alpha / sqrt(r)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        """Return the factors of `weight * scale * B @ A` as (out, in), or as (in, out) if `transposed`."""
        from ..numerics.products import Term

        scale, A, B = Fraction(self.scale) * Fraction(weight), self.A.flatten(1), self.B.flatten(1)
        return [Term(A.T, B.T, scale) if transposed else Term(B, A, scale)]


@dataclass(frozen=True)
class Experts(Update):
    """LoRA on a stack of E matrices (PEFT's target_parameters, `peft/tuners/lora/layer.py:ParamWrapper`)."""

    A: Tensor  # (E * r, in), expert by expert
    B: Tensor  # (out, r * E), for each rank the E experts
    scale: float  # as LowRank.scale
    experts: int  # E

    def expert(self, number: int) -> LowRank:
        rank = len(self.A) // self.experts
        A = self.A.view(self.experts, rank, -1)[number]
        return LowRank(A, self.B.view(-1, rank, self.experts)[:, :, number], self.scale)


@dataclass(frozen=True)
class DoRA(LowRank):
    """DoRA: W' = m * V / ||V|| row by row, with V = W + scale * B @ A (Liu et al., ICML 2024, equation 5)."""

    magnitude: Tensor  # m, one number for each row of V (out, in)


@dataclass(frozen=True)
class AddDelta(Update):
    """A scaled difference of a vector: PEFT's `lora_B.bias`. It is a product of rank 1, so it is summed exactly too."""

    value: Tensor
    scale: float  # as LowRank.scale

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        """Return the product of rank 1 that is `weight * scale * value`, as a column."""
        from ..numerics.products import Term

        column = self.value.reshape(-1, 1)
        return [Term(column, column.new_ones(1, 1), Fraction(self.scale) * Fraction(weight))]


@dataclass(frozen=True)
class ReplaceTensor(Update):
    """A new value for a tensor: modules_to_save, trained biases, a resized vocabulary."""

    value: Tensor  # of the tensor's new shape


@dataclass(frozen=True)
class ReplaceRows(Update):
    """New values for some rows: PEFT's trainable tokens."""

    value: Tensor  # (n, dimension)
    indices: Tensor  # (n,), in any order


# kind -> (class, the roles of its tensors)
UPDATES: dict[str, tuple[type[Update], tuple[str, ...]]] = {
    "lora": (LowRank, ("A", "B")),
    "experts": (Experts, ("A", "B")),
    "dora": (DoRA, ("A", "B", "magnitude")),
    "add": (AddDelta, ("value",)),
    "replace": (ReplaceTensor, ("value",)),
    "rows": (ReplaceRows, ("value",)),
}


ADDITIVE = ("lora", "experts", "add")
