"""Decompose a weight into magnitude and direction, DoRA: W' = m * V / ||V|| (Liu et al., ICML 2024, equation 5).

V = W + D, where D is an additive update of any kind. The norms are of V's rows (the outputs) or, with OneTrainer and
LyCORIS's wd_on_output=False, of its columns (the inputs; `lycoris/modules/locon.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...files.dtypes import TensorSpec
from .update import Detail, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide

# the note for factors of a new rank
BEFORE_NORM = (
    "DoRA: the errors are those of B A, before the norm; the magnitudes are copied, and only a base "
    "could tell the errors after the norm"
)


@dataclass(frozen=True)
class Decomposition(Detail):
    """The additive update under a DoRA."""

    inner: type[Update]
    along_inputs: bool = False  # the norms are of V's columns
    detail: Detail | None = None  # of the inner update


@dataclass(frozen=True)
class DoRA(Update):
    """DoRA around an additive update."""

    inner: Update
    magnitude: Numbers  # m, one number per norm, in any shape

    kind = "dora"
    roles = ("magnitude",)
    additive = False

    @staticmethod
    def of(inner: UpdateSpec, name: str, file_spec: TensorSpec, along_inputs: bool) -> UpdateSpec:
        """Return the spec of a DoRA around `inner`; its magnitude is the tensor `name`."""
        return replace(
            inner,
            cls=DoRA,
            tensors={**inner.tensors, "magnitude": name},
            specs={**inner.specs, "magnitude": file_spec},
            detail=Decomposition(inner.cls, along_inputs, inner.detail),
        )

    @classmethod
    def without_norm(cls, spec: UpdateSpec) -> UpdateSpec:
        assert isinstance(spec.detail, Decomposition)
        tensors = {role: name for role, name in spec.tensors.items() if role != "magnitude"}
        specs = {role: spec.specs[role] for role in tensors}
        return replace(spec, cls=spec.detail.inner, tensors=tensors, specs=specs, detail=spec.detail.detail)

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return cls.without_norm(spec).shape

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return cls.without_norm(spec).rank

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        inner = cls.without_norm(spec)
        return inner.cls.divisor(inner)

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        inner = cls.without_norm(spec)
        return inner.cls.fits(inner, shape)

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        inner = cls.without_norm(spec)
        return inner.cls.flat(inner)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> DoRA:
        inner = cls.without_norm(spec)
        inner_tensors = {role: tensors[role] for role in inner.tensors}
        return cls(inner.cls.make(inner, inner_tensors), tensors["magnitude"])

    @classmethod
    def norm_axis(cls, spec: UpdateSpec, transposed: bool) -> int:
        assert isinstance(spec.detail, Decomposition)
        return int(spec.detail.along_inputs is not transposed)

    def factors(self) -> tuple[Wide, Wide] | None:
        return self.inner.factors()

    def singular_values(self, of_product: Callable[[Wide, Wide], Wide]) -> Wide | None:
        return self.inner.singular_values(of_product)
