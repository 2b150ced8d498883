"""Add a weight made of wavelets, WaveFT: the drawn places are those of coefficients (Bilican et al., 2025).

With `use_idwt` D is the scaling times one step of an inverse wavelet transform, whose filters are float64 numbers
(`numerics/wavelets.py` has the formula); without it, the scaling times the numbers at their places. Defined by
`peft/tuners/waveft/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ..config import AdapterConfig
from .drawn import Drawn, Seed, required
from .shira import sparse_rows
from .update import PeftMethod, RowsOfDelta, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide

ROLE = "waveft_spectrum"


@dataclass(frozen=True)
class Wavelet(Seed):
    """What draws the places, and the wavelet that the numbers are of."""

    name: str

    @property
    def hashed(self) -> tuple[int, ...]:
        return (*super().hashed, *self.name.encode())


@dataclass(frozen=True)
class Filters:
    """The low-pass and the high-pass filter of a wavelet, (2, F)."""

    values: Wide


@dataclass(frozen=True)
class WaveFT(Drawn):
    """An update of WaveFT."""

    filters: Filters | None = None  # without `use_idwt`

    kind = "waveft"
    roles = (ROLE,)
    peft = PeftMethod("WAVEFT", {ROLE: ROLE})

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        from ...numerics.wavelet_filters import FILTERS

        spec = super().describe(spec, config)
        assert isinstance(spec.detail, Seed)
        use, name = (required(config, spec.module, field) for field in ("use_idwt", "wavelet_family"))
        if type(use) is not bool:
            raise InputError(f"the config's use_idwt is {brief(use)}, not true or false", culprit=spec.module)
        if not use:
            return spec
        if not isinstance(name, str) or name not in FILTERS:
            raise InputError(
                f"the config's wavelet_family is {brief(name)}, and known are {', '.join(FILTERS)}",
                culprit=spec.module,
                remedy="merge it with peft, and `loratool extract` the change",
            )
        return replace(spec, detail=Wavelet(spec.detail.seed, name))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> WaveFT:
        from ...numerics.wavelet_filters import reconstruction_filters

        assert isinstance(spec.detail, Seed)
        filters = Filters(reconstruction_filters(spec.detail.name)) if isinstance(spec.detail, Wavelet) else None
        return cls(spec.tensors[ROLE], tensors[ROLE], spec.scale, spec.detail.seed, filters=filters)

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        assert self.places
        scale = Fraction(self.scaling) * Fraction(weight)
        sides = [(self.places.rows, self.outputs), (self.places.columns, self.inputs)]
        (rows, height), (columns, width) = reversed(sides) if transposed else sides
        if self.filters:
            from ...numerics.wavelets import Wavelets

            return Wavelets(self.value, rows, columns, (height, width), self.filters.values, scale).rows
        from ...numerics.composed import multiple

        of_rows = sparse_rows(self.value, rows, columns, width, 1.0)
        return lambda start, stop: multiple(of_rows(start, stop), scale)

    def absolute(self) -> WaveFT:
        filters = Filters(abs(self.filters.values)) if self.filters else None
        return replace(self, value=abs(self.value), filters=filters)
