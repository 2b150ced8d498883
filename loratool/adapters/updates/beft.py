"""Add a trained vector to a layer's bias, BEFT (`peft/tuners/beft/layer.py`); the base must have this bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .add import AddDelta
from .update import PeftMethod, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


@dataclass(frozen=True)
class BEFT(AddDelta):
    """A difference of a bias, stored as one row."""

    kind = "beft"
    roles = ("beft_bias",)
    peft = PeftMethod("BEFT", {"beft_bias": "beft_bias"})

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["beft_bias"].size,)

    @classmethod
    def target(cls, module: str) -> str:
        return module.removesuffix(".bias")

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        sizes = specs["beft_bias"].shape
        if len(sizes) != 2 or sizes[0] != 1:
            raise InputError(f"is {sizes}, not one row", culprit=roles["beft_bias"])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, module=f"{spec.module}.bias", transposed=False)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> BEFT:
        return cls(tensors["beft_bias"].reshape(-1), spec.scale)
