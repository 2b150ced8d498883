"""The closed family of weight updates: what an adapter can do to one tensor.

A class an update, a row in `UPDATES` a class. Additive ones answer `terms`, and any number of them is summed
before the one rounding; of the others a tensor takes one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..numerics.exact import Factors


@dataclass(frozen=True)
class Update:
    """All fields that are tensors have any float dtype; `scale` is the format's alpha over rank where there is one."""

    def to(self, device: torch.device) -> Update:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{k: v.to(device) if hasattr(v, "to") else v for k, v in values.items()})


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA: the change is `scale * B @ A` (Hu et al., ICLR 2022, section 4.1).

    A: (r, in), B: (out, r). A convolution's kernel is flattened behind its first dimension: A is (r, in, *kernel).
    An embedding is a linear layer stored transposed: A is (r, vocabulary), B is (dimension, r).
    """

    A: Tensor
    B: Tensor
    scale: float

    def terms(self, weight: float, transposed: bool) -> list[Factors]:
        """The factors of `weight * scale * B @ A` in the base's layout: (out, in), or (in, out) if `transposed`.

        The scale goes into B in float64 in both layouts, so that a layout does not change a bit.
        """
        from ..numerics.exact import Factors

        scale = self.scale * weight
        A, B = self.A.flatten(1), self.B.flatten(1)
        if transposed:
            return [Factors(A.T, 1.0, (B.double() * scale).T)]
        return [Factors(B, scale, A.double())]


@dataclass(frozen=True)
class Experts(Update):
    """LoRA on a stack of E matrices (PEFT's target_parameters, `peft/tuners/lora/layer.py:ParamWrapper`).

    A: (E * r, in), an expert's rows together; B: (out, r * E), the expert's number running fastest.
    """

    A: Tensor
    B: Tensor
    scale: float
    experts: int

    def expert(self, number: int) -> LowRank:
        rank = len(self.A) // self.experts
        A = self.A.view(self.experts, rank, -1)[number]
        return LowRank(A, self.B.view(-1, rank, self.experts)[:, :, number], self.scale)


@dataclass(frozen=True)
class DoRA(LowRank):
    """`W' = m / ||V|| * V` row by row, where V = W + scale * B @ A (Liu et al., ICML 2024, equation 5).

    magnitude: m, as many numbers as V in (out, in) layout has rows.
    """

    magnitude: Tensor


@dataclass(frozen=True)
class AddDelta(Update):
    """A difference with a scale: PEFT's `lora_B.bias`. It is a product of rank 1 too, and so summed as exactly."""

    value: Tensor
    scale: float

    def terms(self, weight: float, transposed: bool) -> list[Factors]:
        from ..numerics.exact import Factors

        column = self.value.reshape(-1, 1)
        return [Factors(column, self.scale * weight, column.new_ones(1, 1).double())]


@dataclass(frozen=True)
class ReplaceTensor(Update):
    """Another value for the whole tensor: modules_to_save, trained biases, a resized vocabulary."""

    value: Tensor


@dataclass(frozen=True)
class ReplaceRows(Update):
    """Other values for some rows: PEFT's trainable tokens. value: (n, dimension), indices: (n,), in any order."""

    value: Tensor
    indices: Tensor


# kind -> (class, the roles that its tensors have)
UPDATES: dict[str, tuple[type[Update], tuple[str, ...]]] = {
    "lora": (LowRank, ("A", "B")),
    "experts": (Experts, ("A", "B")),
    "dora": (DoRA, ("A", "B", "magnitude")),
    "add": (AddDelta, ("value",)),
    "replace": (ReplaceTensor, ("value",)),
    "rows": (ReplaceRows, ("value",)),
}


ADDITIVE = ("lora", "experts", "add")
