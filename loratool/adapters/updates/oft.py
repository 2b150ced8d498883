"""Rotate the inputs of a layer by blocks, OFT (Qiu et al., NeurIPS 2023; Liu et al., OFTv2, 2025).

X = diag(s) W R.T, R block-diagonal, for a linear layer and a convolution with its kernel flattened. Layouts:

- `oft_R.weight` (n, b (b - 1) / 2): Q are skew matrices with these numbers in the upper triangles. R is a series of Q,
  with the sign of (I + Q)(I - Q)^-1, or (I - Q)(I + Q)^-1: PEFT from 0.16 on, whose config says which
  (`peft/tuners/oft/layer.py`). OneTrainer and forks of musubi-tuner have the series of five terms
  (`modules/module/oft_utils.py` of OneTrainer); OneTrainer turns convolutions the other way, X = W R.
- `oft_embedding_R.weight`, the same for an embedding, X = W R.
- `oft_r` (n, b, b) and `oft_s` (out, 1), PEFT 0.14 and 0.15: S = (O - O.T) / 2, R = (I - S)(I + S)^-1, s = oft_s.
- `oft_r` alone, PEFT up to 0.13: the same R by blocks of the outputs, X = R.T W; the last block is cut to the outputs.

With `coft`, Q (of `oft_r`, O) is first multiplied by min(1, e / ||Q||), e = eps / sqrt(n), up to 0.13 times b**2.
A single block is shared by all if the layer has more inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .rotations import are_small, defect, root, rotations, skew_parts, squares, upper_triangles
from .update import Detail, Fault, PeftMethod, Rotated, Update, UpdateSpec, finite_numbers

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.mixed import Mixing

TERMS = 5  # of the series in files without a config
MOST_TERMS = 64
TRIANGLES = ("oft_R", "oft_embedding_R")
# musubi's forks write settings as tensors
SETTINGS = tuple(
    f"{name}_metadata" for name in ("oft_block_size", "oft_block_share", "oft_coft", "coft_eps", "scaled_oft")
)
_VERSION = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True)
class Rotation(Detail):
    """How the rotations follow from the numbers."""

    coefficients: tuple[int, ...] | None  # of the series; None for Cayley's transform
    turned: bool = False  # X = W R instead of W R.T
    eps: float = 0.0  # the bound on a block's norm is eps / sqrt(n); 0 for none
    is_scaled: bool = False  # the numbers are divided by 2 sqrt(b - 1)
    turns_kernels: bool = False  # it is `turned` for a convolution

    @property
    def hashed(self) -> tuple[int, ...]:
        eps = Fraction(self.eps)
        return (*(self.coefficients or ()), int(self.turned), int(self.is_scaled), eps.numerator, eps.denominator)


@dataclass(frozen=True)
class OFT(Update):
    """OFT of a linear layer, a convolution or an embedding."""

    value: Numbers  # (n, b (b - 1) / 2), or (n, b, b) of old files
    scales: Numbers | None  # (out,)
    rotation: Rotation
    outputs: int = 0
    inputs: int = 0

    kind = "oft"
    roles = ()
    optional = (*TRIANGLES, "oft_r", "oft_s", "scaled_oft", *SETTINGS)
    suffixes: ClassVar = {".oft_R.weight": "oft_R", ".oft_R.scaled_oft": "scaled_oft", **{f".{x}": x for x in SETTINGS}}
    peft = PeftMethod("OFT", {**{f"{role}.weight": role for role in TRIANGLES}, "oft_r": "oft_r", "oft_s": "oft_s"})
    additive = False
    flattened = True
    mixes = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs[_key(spec)].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        n, b = blocks_of(spec)
        side = shape[0] if _of_outputs(spec) else math.prod(shape[1:])
        if len(shape) < 2 or ("oft_s" in spec.specs and spec.specs["oft_s"].size != shape[0]):
            return False
        if _of_outputs(spec):
            return side > 0 and n in (1, -(-side // b))
        return side == n * b or (n == 1 and side > 0 and side % b == 0)

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        n, b = blocks_of(spec)
        outputs = spec.specs["oft_s"].size if "oft_s" in spec.specs else None
        return outputs, None if n == 1 or _of_outputs(spec) else n * b

    @classmethod
    def of_tensor(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> UpdateSpec:
        rotation = spec.detail
        if isinstance(rotation, Rotation) and rotation.turns_kernels and len(shape) > 2:
            return replace(spec, detail=replace(rotation, turned=True))
        return spec

    @classmethod
    def misread(cls, spec: UpdateSpec) -> Mapping[Fault, UpdateSpec]:
        assert isinstance(spec.detail, Rotation)
        faults: dict[Fault, Rotation] = {"turned": replace(spec.detail, turned=not spec.detail.turned)}
        if spec.detail.eps:
            faults["unbound"] = replace(spec.detail, eps=0.0)
        return {fault: replace(spec, detail=detail) for fault, detail in faults.items()}

    @classmethod
    def together(cls, spec: UpdateSpec, transposed: bool) -> int:
        return 1 if _of_outputs(spec) is transposed else blocks_of(spec)[1]

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        values = [role for role in (*TRIANGLES, "oft_r") if role in roles]
        if len(values) != 1 or ("oft_s" in roles and values != ["oft_r"]):
            raise InputError(f"has {' and '.join(sorted(roles))}, which no OFT has together", culprit=module)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        key = next(role for role in (*TRIANGLES, "oft_r") if role in specs)
        shape = specs[key].shape
        if key == "oft_r":
            good = len(shape) == 3 and shape[1] == shape[2] and all(shape)
            wanted = "square blocks"
        else:
            good = len(shape) == 2 and all(shape) and _size(shape[1]) is not None
            wanted = "upper triangles of square blocks"
        if not good:
            raise InputError(f"is {shape}, not {wanted}", culprit=roles[key])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        fields, key = config.peft, _key(spec)
        eps = _eps(spec, fields)
        if key == "oft_r":
            return replace(spec, transposed=_transposed(config), detail=Rotation(None, False, eps))
        if fields.get("peft_type") == "OFT":
            cayley = fields.get("use_cayley_neumann", True) is False
            turned = key == "oft_embedding_R"
            # (I - Q)(I + Q)^-1 is the transpose of (I + Q)(I - Q)^-1
            coefficients = None if cayley else _coefficients(spec, fields)
            rotation = Rotation(coefficients, turned is not cayley, eps)
        elif config.rank_is_alpha:
            rotation = Rotation((2,) * (TERMS - 2) + (1,), False, eps, turns_kernels=True)
        else:
            raise InputError(
                "only the config tells the series of its rotations, and their direction", culprit=spec.tensors[key]
            )
        return replace(spec, transposed=_transposed(config) if key == "oft_R" else False, detail=rotation)

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
        spec = super().from_headers(module, roles, file, config, transposed, lenient)
        if isinstance(spec.detail, Rotation) and spec.specs.keys() & {"scaled_oft", *SETTINGS}:
            said = {role: file.scalar(roles[role]) for role in SETTINGS if role in roles}
            eps = said.get("coft_eps_metadata", 0.0) if said.get("oft_coft_metadata") else 0.0
            scaled = "scaled_oft" in roles or bool(said.get("scaled_oft_metadata"))
            spec = replace(spec, detail=replace(spec.detail, eps=eps, is_scaled=scaled))
        return spec

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> OFT:
        values = {role: name for role, name in spec.tensors.items() if role in (*TRIANGLES, "oft_r", "oft_s")}
        return cls.make(spec, finite_numbers(values, file, adapter))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> OFT:
        assert isinstance(spec.detail, Rotation)
        scales = tensors.get("oft_s")
        return cls(tensors[_key(spec)], None if scales is None else scales.reshape(scales.size), spec.detail)

    def sized(self, outputs: int, inputs: int) -> OFT:
        return replace(self, outputs=outputs, inputs=inputs)

    def rotated(self) -> Rotated:
        R, kept = self._rotations()
        return Rotated(defect(R), any(each < 1 for each in kept))

    def mixing(self, weight: float, transposed: bool) -> Mixing:
        from ...numerics.mixed import Mixing

        R, _ = self._rotations()
        M = R if self.rotation.turned else R.swapaxes(1, 2)
        scales = None if self.scales is None else self.scales.wide()
        of_outputs = len(self.value.shape) == 3 and self.scales is None
        is_rotation = self.rotation.coefficients is None or are_small(R)
        mixing = Mixing(M[:, None] if of_outputs else M[None], 1 - of_outputs, weight, scales, is_rotation=is_rotation)
        return mixing.T if transposed else mixing

    def multiplied_out(self) -> Wide:
        """Return the numbers of triangles that need no division and no bound for these rotations, in float64."""
        factor, kept = self._factors(self._skew())
        return self.value.wide() * [[float(factor * each)] for each in kept]

    def _rotations(self) -> tuple[Wide, list[Fraction]]:
        """Return R - I of each block, and the share of its numbers that a bound keeps."""
        Q = self._skew()
        factor, kept = self._factors(Q)
        return rotations(Q, self.rotation.coefficients, [factor * each for each in kept]), kept

    def _skew(self) -> list[Wide]:
        is_old = len(self.value.shape) == 3
        return skew_parts(self.value) if is_old else upper_triangles(self.value, _size(self.value.shape[1]) or 0)

    def _factors(self, Q: list[Wide]) -> tuple[Fraction, list[Fraction]]:
        """Return the factor of all numbers, and the share that a bound keeps of those of each block."""
        is_old = len(self.value.shape) == 3
        factor, kept = Fraction(-1, 2) if is_old else Fraction(1), [Fraction(1)]
        if self.rotation.is_scaled:
            factor = 1 / (2 * root(Fraction(Q[0].shape[-1] - 1)))
        if self.rotation.eps:
            bound, normed = Fraction(self.rotation.eps) ** 2 / len(Q[0]), [self.value.wide()] if is_old else Q
            kept = [min(Fraction(1), root(bound / x)) if x else Fraction(1) for x in squares(normed)]
        return factor, kept


def _key(spec: UpdateSpec) -> str:
    return next(role for role in (*TRIANGLES, "oft_r") if role in spec.specs)


def blocks_of(spec: UpdateSpec) -> tuple[int, int]:
    """Return how many blocks there are, and the size of one."""
    shape = spec.specs[_key(spec)].shape
    return shape[0], (shape[1] if len(shape) == 3 else _size(shape[1])) or 0


def _size(count: int) -> int | None:
    """Return the b of b (b - 1) / 2 numbers."""
    b = (1 + math.isqrt(1 + 8 * count)) // 2
    return b if b * (b - 1) // 2 == count and count else None


def _of_outputs(spec: UpdateSpec) -> bool:
    return "oft_r" in spec.specs and "oft_s" not in spec.specs


def _transposed(config: AdapterConfig) -> bool | None:
    return False if config.fan_in_fan_out is None else config.fan_in_fan_out


def _eps(spec: UpdateSpec, fields: Mapping[str, Any]) -> float:
    if not fields.get("coft"):
        return 0.0
    eps = fields.get("eps", 6e-5)
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise InputError(f"the config says eps {brief(eps)}, not the bound of coft", culprit=spec.module)
    return float(eps) * (blocks_of(spec)[1] ** 2 if _of_outputs(spec) else 1)


def _coefficients(spec: UpdateSpec, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the coefficients of PEFT's series; those of 0.16 and 0.17, whose configs have no version, end by a 2."""
    terms = fields.get("num_cayley_neumann_terms", TERMS)
    if type(terms) is not int or not 0 < terms <= MOST_TERMS:
        raise InputError(f"the config says {brief(terms)} terms of a series", culprit=spec.module)
    version = _VERSION.match(str(fields.get("peft_version")))
    if not version or (int(version[1]), int(version[2])) < (0, 18):
        return (2,) * (terms - 1) or (0,)
    if terms < 3:
        return (0,) if terms == 1 else (2,)
    return (2, 2, 1) if terms < 5 else (*(2,) * (terms - 2), 1)
