"""Multiply the inputs or the outputs of a layer by a vector, (IA)3 (Liu et al., NeurIPS 2022).

PEFT's vector l is the factor, W' = W * l (`peft/tuners/ia3/layer.py`). LyCORIS's vector v is added to 1:
W' = W * (1 + v) (`lycoris/modules/ia3.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from ..patterns import Targets
from .update import Detail, PeftMethod, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Factor


@dataclass(frozen=True)
class Side(Detail):
    """The side that a vector multiplies, and the vector's form."""

    inputs: bool
    difference: bool  # the vector is a difference from 1


@dataclass(frozen=True)
class IA3(Update):
    """(IA)3 of a weight, or of a layer's bias if the outputs are multiplied."""

    vector: Numbers  # (n,)
    side: Side

    kind = "ia3"
    roles = ()
    optional = ("ia3_l", "weight", "on_input")  # PEFT's; LyCORIS's two
    suffixes: ClassVar = {".weight": "weight", ".on_input": "on_input"}
    peft = PeftMethod("IA3", {"ia3_l": "ia3_l"})
    additive = False

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
        key = roles.get("ia3_l") or roles.get("weight") or next(iter(roles.values()))
        spec, sizes = file.specs[key], file.specs[key].shape
        if "ia3_l" not in roles and not {"weight", "on_input"} <= roles.keys():
            raise InputError("is a weight without on_input, or on_input without a weight: not (IA)3", culprit=key)
        if max(sizes, default=1) != spec.size:
            raise InputError(f"is {sizes}, not a vector", culprit=key)
        if "on_input" in roles:
            number = file.scalar(roles["on_input"])
            if number not in (0, 1):
                raise InputError(f"is {number:g}, neither 0 nor 1", culprit=roles["on_input"])
            side = Side(number == 1, difference=True)
        elif len(sizes) == 2 and spec.size > 1:
            side = Side(sizes[0] == 1, difference=False)
        elif config.peft.get("peft_type") != cls.peft.type:
            raise InputError("scales inputs or outputs, and only the config tells which", culprit=key)
        else:
            side = Side(Targets(config.peft.get("feedforward_modules") or []).has(module), difference=False)
        return UpdateSpec(cls, module, {"vector": key}, {"vector": spec}, 1.0, transposed, side, roles.get("base"))

    @classmethod
    def of_bias(cls, spec: UpdateSpec, bias: str) -> UpdateSpec | None:
        """Return the update of the bias: PEFT multiplies a layer's output, LyCORIS only its weight."""
        side = _side_of(spec)
        of_outputs = not side.inputs and not side.difference
        return replace(spec, module=bias, transposed=False, base=None, optional=True) if of_outputs else None

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        size = spec.specs["vector"].size
        return (1, size) if _side_of(spec).inputs else (size,)

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        axis = int(_side_of(spec).inputs)
        return len(shape) > axis and shape[axis] == spec.specs["vector"].size

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return (None, None) if _side_of(spec).inputs else (spec.specs["vector"].size, None)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> IA3:
        return cls(tensors["vector"].reshape(-1), _side_of(spec))

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[None, Factor]:
        from ...numerics.decide import Factor

        w, offset = Fraction(weight), Fraction(int(self.side.difference))
        numbers = [1 + w * (Fraction(x) + offset - 1) for x in self.vector.wide().tolist()]
        if self.side.inputs is not transposed:
            return None, Factor.of_columns(numbers).repeated(columns // len(numbers))
        return None, Factor.of_rows(numbers[rows])


def _side_of(spec: UpdateSpec) -> Side:
    assert isinstance(spec.detail, Side)
    return spec.detail
