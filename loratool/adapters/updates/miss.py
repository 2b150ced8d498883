"""Add a block of numbers over and over along the inputs, MiSS: D[i, j] = M[j mod r, i] (Kang and Yin, 2024).

Defined by `peft/tuners/miss/layer.py`; the variant `mini` repeats a narrower block along the outputs too. Bone is MiSS
under the name that PEFT 0.14 to 0.18 had for it. Only the base shows the number of a module's inputs.

The variant `bat` of both has blocks M_o of three axes, (out / r, r, r). It multiplies the weight: for rows o of r and
columns c of r, X_oc = W_oc + W_oc M_o + M_o.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .tucker import transposed_terms
from .update import Detail, PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.mixed import Mixing
    from ...numerics.products import Term


@dataclass(frozen=True)
class Mini(Detail):
    """The block repeats along the outputs too."""


@dataclass(frozen=True)
class MiSS(Update):
    """An update of MiSS; the size is that of the weight."""

    block: Numbers  # (r, out), of mini (r, a divisor of out)
    outputs: int = 0
    inputs: int = 0

    kind = "miss"
    roles = ("miss_block",)
    peft = PeftMethod("MISS", {"miss_block": "miss_block"})

    @classmethod
    def from_headers(
        cls,
        module: str,
        roles: Mapping[str, str],
        file: WeightsFile,
        config: AdapterConfig,
        transposed: bool | None = None,
        lenient: bool = False,
    ) -> UpdateSpec:
        is_bat = all(len(file.specs[name].shape) == 3 for role, name in roles.items() if role in cls.roles)
        read = Bat.from_headers if is_bat else super().from_headers
        return read(module, roles, file, config, transposed, lenient)

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs[cls.roles[0]].shape[1:]

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        (width,) = spec.shape
        return len(shape) == 2 and (shape[0] % width == 0 if isinstance(spec.detail, Mini) else shape[0] == width)

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return None if isinstance(spec.detail, Mini) else spec.shape[0], None

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        shape = specs[cls.roles[0]].shape
        if len(shape) != 2 or not shape[0] * shape[1]:
            raise InputError(f"is {shape}, not a block of r by the outputs", culprit=roles[cls.roles[0]])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        rank, width = spec.specs[cls.roles[0]].shape
        require_rank(spec, config, rank)
        variant, mini_r = config.peft.get("init_weights", True), config.peft.get("mini_r")
        if variant not in (True, False, "mini"):
            raise InputError(
                f"the config says init_weights {brief(variant)}, but its tensor is not of that variant",
                culprit=spec.module,
                remedy="the config is of another adapter",
            )
        if variant == "mini" and mini_r != width:
            raise InputError(
                f"the config says mini_r {brief(mini_r)}, but its block is for {width} outputs",
                culprit=spec.module,
                remedy="the config is of another adapter",
            )
        return replace(spec, transposed=False, detail=Mini() if variant == "mini" else None)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> MiSS:
        return cls(tensors[cls.roles[0]])

    def sized(self, outputs: int, inputs: int) -> MiSS:
        return replace(self, outputs=outputs, inputs=inputs)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        import numpy as np

        from ...numerics.arrays import Numbers
        from ...numerics.products import Term

        rank, width = self.block.shape
        left = self.block[:, np.arange(self.outputs) % width].T
        right = np.arange(rank)[:, None] == np.arange(self.inputs)[None] % rank
        terms = [Term(left, Numbers.of(right.astype(np.float32)), Fraction(weight))]
        return transposed_terms(terms) if transposed else terms


@dataclass(frozen=True)
class Bone(MiSS):
    """An update of Bone, which is MiSS without `mini`."""

    kind = "bone"
    roles = ("bone_block",)
    peft = PeftMethod("BONE", {"bone_block": "bone_block"})


@dataclass(frozen=True)
class Bat(Update):
    """An update of MiSS or Bone that multiplies the weight."""

    block: Numbers  # (out / r, r, r)

    kind = "bat"
    roles = ()
    optional = ("miss_block", "bone_block")
    additive = False
    mixes = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return _block_of(spec).shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        count, r, _ = _block_of(spec).shape
        return len(shape) == 2 and shape[0] == count * r and shape[1] % r == 0 < shape[1]

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        count, r, _ = _block_of(spec).shape
        return count * r, None

    @classmethod
    def together(cls, spec: UpdateSpec, transposed: bool) -> int:
        return _block_of(spec).shape[1] if transposed else 1

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        (shape,) = (spec.shape for spec in specs.values())
        if shape[1] != shape[2] or not all(shape):
            raise InputError(f"is {shape}, not square blocks", culprit=next(iter(roles.values())))

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, _block_of(spec).shape[1])
        variant = config.peft.get("init_weights", "bat")
        if variant != "bat":
            raise InputError(
                f"the config says init_weights {brief(variant)}, but its tensor is of the variant bat",
                culprit=spec.module,
                remedy="the config is of another adapter",
            )
        return replace(spec, transposed=False)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Bat:
        (block,) = tensors.values()
        return cls(block)

    def mixing(self, weight: float, transposed: bool) -> Mixing:
        from ...numerics.mixed import Mixing

        count, r, _ = self.block.shape
        mixing = Mixing(self.block.wide()[:, None], 1, weight, added=self.block.reshape(count * r, r))
        return mixing.T if transposed else mixing


def _block_of(spec: UpdateSpec) -> TensorSpec:
    (block,) = spec.specs.values()
    return block
