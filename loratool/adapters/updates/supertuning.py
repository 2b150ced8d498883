"""Add numbers to single elements of a weight, and a low-rank product if there is one, SuperTuning.

D is the sum of the numbers at each place, which counts the elements of (out, in) row by row, plus scale * B @ A.
Defined by `peft/tuners/supertuning/layer.py`. Without B and A only the base shows the size of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .indices import read_integers, require_integers
from .shira import sparse_rows
from .tucker import transposed_terms
from .update import PeftMethod, RowsOfDelta, Update, UpdateSpec, finite_numbers, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Positions
    from ...numerics.products import Term

FACTORS = ("supertuning_lora_A", "supertuning_lora_B")


@dataclass(frozen=True)
class FlatPlaces:
    """The elements that an update changes, counted row by row."""

    name: str  # of the tensor that has them
    flat: Positions


@dataclass(frozen=True)
class SuperTuning(Update):
    """An update of SuperTuning."""

    value: Numbers  # (n,)
    places: FlatPlaces  # n
    A: Numbers | None  # (r, in)
    B: Numbers | None  # (out, r)
    scale: float  # alpha / r
    outputs: int = 0
    inputs: int = 0

    kind = "supertuning"
    roles = ("supertuning_values", "supertuning_indices")
    optional = FACTORS
    peft = PeftMethod(
        "SUPERTUNING", {**{role: role for role in roles}, **{f"{role}.weight": role for role in FACTORS}}, "lora_alpha"
    )

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        A, B = (spec.specs.get(role) for role in FACTORS)
        return (B.shape[0], A.shape[1]) if A and B else spec.specs["supertuning_values"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and (FACTORS[0] not in spec.specs or shape == spec.shape)

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return None, None

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        if "supertuning_indices" not in roles:
            raise InputError(
                "is SuperTuning, but the places of its numbers are not in the file",
                culprit=next(iter(roles.values())),
                remedy="save it with peft with save_precomputed_indices=True in its config",
            )
        super().require(module, roles)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        value, indices = (specs[role] for role in cls.roles)
        require_integers(indices, roles["supertuning_indices"])
        if len(value.shape) != 1 or indices.shape != value.shape:
            raise InputError(f"has {value.shape} numbers at {indices.shape} places", culprit=module)
        if len(specs.keys() & FACTORS) == 1:
            raise InputError(f"one of the factors of {module} is missing", culprit=next(iter(roles.values())))
        if FACTORS[0] in specs:
            A, B = (specs[role].shape for role in FACTORS)
            if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] == 0:
                raise InputError(f"A is {A} and B is {B}: they do not share a rank", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        rank = spec.specs[FACTORS[0]].shape[0] if FACTORS[0] in spec.specs else 0
        if rank:
            require_rank(spec, config, rank)
        elif config.rank_of(spec.module):
            raise InputError(
                f"the config says rank {config.rank_of(spec.module)}, but it has no factors", culprit=spec.module
            )
        return replace(spec, transposed=False, scale=config.scale_of(spec.module, rank) if rank else 1.0)

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> SuperTuning:
        names = {role: name for role, name in spec.tensors.items() if role != cls.roles[1]}
        numbers = finite_numbers(names, file, adapter)
        indices = spec.tensors[cls.roles[1]]
        A, B = (numbers.get(role) for role in FACTORS)
        return cls(numbers[cls.roles[0]], FlatPlaces(indices, read_integers(file, indices)), A, B, spec.scale)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> SuperTuning:
        raise TypeError("its places are integers, which only `load` reads")

    def sized(self, outputs: int, inputs: int) -> SuperTuning:
        beyond = int(self.places.flat.max(initial=-1))
        if beyond >= outputs * inputs:
            raise InputError(
                f"names the element {beyond:,} of a weight of ({outputs}, {inputs})", culprit=self.places.name
            )
        return replace(self, outputs=outputs, inputs=inputs)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.products import Term

        if self.A is None or self.B is None:
            return []
        terms = [Term(self.B, self.A, Fraction(self.scale) * Fraction(weight))]
        return transposed_terms(terms) if transposed else terms

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        rows, columns = self.places.flat // self.inputs, self.places.flat % self.inputs
        places, width = ((columns, rows), self.outputs) if transposed else ((rows, columns), self.inputs)
        return sparse_rows(self.value, *places, width, weight)
