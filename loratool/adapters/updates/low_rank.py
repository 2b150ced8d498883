"""Add a low-rank product, LoRA: the delta is `scale * B @ A` (Hu et al., ICLR 2022, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import Detail, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits, Wide
    from ...numerics.products import Term


@dataclass(frozen=True)
class MergedLinear(Detail):
    """loralib's layer of equal slices of rows; B is stored for the enabled slices."""

    enabled: tuple[bool, ...]


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA. An embedding counts as a linear layer stored transposed: A is (r, vocabulary), B is (dimension, r)."""

    A: Numbers  # (r, in), of a convolution (r, in, *kernel)
    B: Numbers  # (out, r), of a convolution (out, r, 1, ...)
    scale: float  # alpha / r, with rsLoRA alpha / sqrt(r)

    kind = "lora"
    roles = ("A", "B")

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["B"].shape[0], *spec.specs["A"].shape[1:])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["A"].shape[0]

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B = specs["A"].shape, specs["B"].shape
        if min(len(A), len(B)) < 2 or any(size != 1 for size in B[2:]):
            raise InputError(f"A is {A} and B is {B}: not a low-rank pair", culprit=module)
        if A[0] != B[1] or A[0] == 0:
            hint = "; a grouped convolution has no LoRA that could be merged" if len(A) > 2 and A[0] else ""
            raise InputError(f"A is {A} and B is {B}: they do not share a rank{hint}", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        rank, expected = spec.specs["A"].shape[0], config.rank_of(spec.module)
        if expected is not None and expected != rank:
            raise other_rank(spec, expected)
        return replace(spec, scale=config.scale_of(spec.module, rank))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> LowRank:
        B = tensors["B"]
        if isinstance(spec.detail, MergedLinear):
            B = _expand_merged_linear(B, spec.detail.enabled)
        return cls(tensors["A"], B, spec.scale)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.products import Term

        scale, A, B = Fraction(self.scale) * Fraction(weight), self.A.matrix, self.B.matrix
        return [Term(A.T, B.T, scale) if transposed else Term(B, A, scale)]

    def factors(self) -> tuple[Wide, Wide]:

        B, A = (side.matrix.wide()[None] for side in (self.B, self.A))
        return B * self.scale, A


def other_rank(spec: UpdateSpec, expected: int) -> InputError:
    """Return the error for factors of another rank than the config's."""
    return InputError(
        f"the config says rank {expected}, but A is {spec.specs['A'].shape}",
        culprit=spec.module,
        remedy="the config is of another adapter",
    )


def _expand_merged_linear(B: Numbers, enabled: Sequence[bool]) -> Numbers:
    """Expand a MergedLinear's B (rows of the n enabled slices, r) to LoRA's block-sparse B (out, r * n).

    The g-th enabled slice uses rows g * r to (g + 1) * r of A: loralib convolves A with B in n groups
    (microsoft/LoRA: loralib/layers.py).
    """
    import numpy as np

    from ...numerics.arrays import Numbers

    n, (rows, r) = sum(enabled), B.shape
    size = rows // n
    expanded: Bits = np.zeros((size * len(enabled), r * n), B.form.bits_type)
    for g, slot in enumerate(i for i, on in enumerate(enabled) if on):
        expanded[slot * size : (slot + 1) * size, g * r : (g + 1) * r] = B.bits[g * size : (g + 1) * size]
    return Numbers(expanded, B.form)
