"""Add a sum of cosines, FourierFT: D[x, y] = scaling / (out in) * sum of s_k cos(2 pi (u_k x / out + v_k y / in)).

(u_k, v_k) are the drawn places of the numbers s_k (Gao et al., ICML 2024; `peft/tuners/fourierft/layer.py`, where D is
the real part of an inverse Fourier transform). With a = u_k x / out and b = v_k y / in of a turn, the cosine is cos a
cos b - sin a sin b. Each of these four is defined as the nearest float64 number. What follows from them is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from .drawn import Drawn, Seed
from .shira import Places
from .update import PeftMethod, RowsOfDelta, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers

ROLE = "fourierft_spectrum"


@dataclass(frozen=True)
class FourierFT(Drawn):
    """An update of FourierFT."""

    kind = "fourierft"
    roles = (ROLE,)
    peft = PeftMethod("FOURIERFT", {ROLE: ROLE})

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> FourierFT:
        assert isinstance(spec.detail, Seed)
        return cls(spec.tensors[ROLE], tensors[ROLE], spec.scale, spec.detail.seed)

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        from ...numerics.cosines import Cosines

        assert self.places
        scale = Fraction(self.scaling / (self.outputs * self.inputs)) * Fraction(weight)
        sides = [(self.places.rows, self.outputs), (self.places.columns, self.inputs)]
        (down, height), (across, width) = reversed(sides) if transposed else sides
        return Cosines(self.value, down, across, (height, width), scale).rows

    def absolute(self) -> FourierFT:
        import numpy as np

        from ...numerics.arrays import Numbers

        total = math.fsum(np.abs(self.value.wide()).tolist())  # no cosine is more than 1
        nowhere = np.zeros(1, np.int64)  # of no frequency, where it is 1 everywhere
        return replace(self, value=Numbers.of(np.array([total])), places=Places(self.name, nowhere, nowhere))
