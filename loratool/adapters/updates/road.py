"""Turn pairs of a layer's outputs, RoAd (Liao and Monz, NeurIPS 2024): X = R W, and the bias becomes R bias.

In each group of g outputs, i and i + g / 2 are a pair, and with c = alpha cos(theta) and s = alpha sin(theta) of each
output y_i = c_i x_i - s_i x_(i + g / 2) and y_(i + g / 2) = c_(i + g / 2) x_(i + g / 2) + s_(i + g / 2) x_i. Both of a
pair share theta and alpha in road_1; in road_4 the halves of 2 g numbers are for c and for s. The variant follows from
the number of them (`peft/tuners/road/layer.py`). The entries of R less the unit matrix are the nearest float64 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import Detail, PeftMethod, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.mixed import Mixing

VARIANTS = {"road_1": Fraction(1, 2), "road_2": Fraction(1), "road_4": Fraction(2)}  # numbers of an output


@dataclass(frozen=True)
class Groups(Detail):
    """How the numbers belong to outputs."""

    variant: str
    size: int

    @property
    def hashed(self) -> tuple[int, ...]:
        return int(self.variant[-1]), self.size


@dataclass(frozen=True)
class RoAd(Update):
    """RoAd of a linear layer, or of its bias."""

    theta: Numbers
    alpha: Numbers
    groups: Groups

    kind = "road"
    roles = ("road_theta", "road_alpha")
    peft = PeftMethod("ROAD", {role: role for role in roles})
    additive = False
    mixes = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["road_theta"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) in (1, 2) and shape[0] == _outputs(spec)

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return _outputs(spec), None

    @classmethod
    def together(cls, spec: UpdateSpec, transposed: bool) -> int:
        assert isinstance(spec.detail, Groups)
        return 1 if transposed else spec.detail.size

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        theta, alpha = (specs[role].shape for role in cls.roles)
        if len(theta) != 1 or theta != alpha or not theta[0]:
            raise InputError(f"has angles {theta} and lengths {alpha}, not as many of both", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        variant, size = (config.peft.get(field) for field in ("variant", "group_size"))
        if config.peft.get("peft_type") != cls.peft.type:
            raise InputError("only the config tells the variant and the groups of RoAd", culprit=spec.module)
        variant, size = variant or "road_1", 64 if size is None else size
        if variant not in VARIANTS or type(size) is not int or size < 2 or size % 2:
            raise InputError(
                f"the config says variant {brief(variant)} in groups of {brief(size)}", culprit=spec.module
            )
        spec = replace(spec, transposed=False, detail=Groups(variant, size))
        if _outputs(spec) % size:
            raise InputError(
                f"its {spec.specs['road_theta'].size} numbers do not make groups of {size}",
                culprit=spec.module,
                remedy="the config is of another adapter",
            )
        return spec

    @classmethod
    def of_bias(cls, spec: UpdateSpec, bias: str) -> UpdateSpec:
        return replace(spec, module=bias, base=None, optional=True)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> RoAd:
        assert isinstance(spec.detail, Groups)
        return cls(tensors["road_theta"], tensors["road_alpha"], spec.detail)

    def mixing(self, weight: float, transposed: bool) -> Mixing:
        import numpy as np

        from ...numerics.mixed import Mixing
        from ...numerics.trigonometry import cos_sin

        size, variant = self.groups.size, self.groups.variant
        theta, alpha = ([Fraction(x) for x in each.wide().tolist()] for each in (self.theta, self.alpha))
        turned = {angle: cos_sin(angle) for angle in dict.fromkeys(theta)}
        count = int(len(theta) / VARIANTS[variant])
        half, R = size // 2, np.zeros((count // size, 1, size, size))
        for i in range(count):
            group, k = divmod(i, size)
            first = second = i
            if variant == "road_1":
                first = second = group * half + k % half
            elif variant == "road_4":
                first, second = 2 * group * size + k, (2 * group + 1) * size + k
            sign, other = (-1, k + half) if k < half else (1, k - half)
            R[group, 0, k, k] = float(alpha[first] * turned[theta[first]][0] - 1)
            R[group, 0, k, other] = float(sign * alpha[second] * turned[theta[second]][1])
        mixing = Mixing(R, 0, weight)
        return mixing.T if transposed else mixing


def _outputs(spec: UpdateSpec) -> int:
    assert isinstance(spec.detail, Groups)
    return int(spec.specs["road_theta"].size / VARIANTS[spec.detail.variant])
