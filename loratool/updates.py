"""The closed family of weight updates: what an adapter can do to one tensor.

A class an update, a row in `UPDATES` a class. A merge knows only what an update answers: its terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .numerics.exact import Factors


@dataclass(frozen=True)
class LowRank:
    """LoRA: the change is `scale * B @ A` (Hu et al., ICLR 2022, section 4.1).

    A: (r, in), B: (out, r), any float dtype; scale is the format's alpha over rank.
    """

    A: Tensor
    B: Tensor
    scale: float

    def to(self, device: torch.device) -> LowRank:
        return LowRank(self.A.to(device), self.B.to(device), self.scale)

    def terms(self, weight: float, transposed: bool) -> list[Factors]:
        """The factors of `weight * scale * B @ A` in the base's layout: (out, in), or (in, out) if `transposed`.

        The scale goes into B in float64 in both layouts, so that a layout does not change a bit.
        """
        from .numerics.exact import Factors

        scale = self.scale * weight
        if transposed:
            return [Factors(self.A.T, 1.0, (self.B.double() * scale).T)]
        return [Factors(self.B, scale, self.A.double())]


# kind -> (class, the roles of its tensors, which are its fields)
UPDATES: dict[str, tuple[type[LowRank], tuple[str, ...]]] = {"lora": (LowRank, ("A", "B"))}
