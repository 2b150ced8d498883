"""Add a low-rank product with a small matrix between its factors, TinyLoRA: D = B (sum over i of v_i P_i) A.

Defined by `peft/tuners/tinylora/layer.py`. A and B come from the base's SVD, the P_i from a seed; the file has them all
with `save_projection`. Modules share vectors v in groups, by their number in the order of the model's modules. The
files have no such order, so it is known only for one group, and for modules whose paths differ only in numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ...architectures.numbered_names import split_numbers
from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .sums import sum_exactly
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term


GROUPED = "tinylora_v"


@dataclass(frozen=True)
class TinyLoRA(Update):
    """An update of TinyLoRA, with its group's vector."""

    A: Numbers  # (r, in)
    B: Numbers  # (out, r)
    P: Numbers  # (u, r, r)
    v: Numbers  # (u,)

    kind = "tinylora"
    roles = ("tinylora_A", "tinylora_B", "tinylora_P", GROUPED)
    peft = PeftMethod("TINYLORA", {role: role for role in roles[:3]}, shared=roles[3:])

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["tinylora_B"].shape[0], spec.specs["tinylora_A"].shape[1])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["tinylora_A"].shape[0]

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        return True

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        if "tinylora_P" not in roles:
            raise InputError(
                "is TinyLoRA, but its random matrices are not in the file",
                culprit=next(iter(roles.values())),
                remedy="save it with peft with save_projection=True in its config",
            )
        super().require(module, roles)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B, P, v = (specs[role].shape for role in cls.roles)
        if len(A) != 2 or len(B) != 2 or not A[0] or A[0] != B[1] or len(v) != 1 or (*v, A[0], A[0]) != P:
            raise InputError(f"A is {A}, B is {B}, P is {P}, v is {v}: they cannot be multiplied", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        if cls.rank(spec) < min(cls.shape(spec)):  # of a smaller weight, the rank is its smaller side
            require_rank(spec, config, cls.rank(spec))
        return spec

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> TinyLoRA:
        return cls(*(tensors[role] for role in cls.roles))

    def _middle(self) -> list[Wide]:
        """Return the matrix between the factors, (r, r), as arrays with the exact sum."""
        from ...numerics.exact_factors import multiply_exactly

        products = multiply_exactly(self.v[:, None, None], self.P)
        return sum_exactly(matrix for part in products for matrix in part.wide())

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.arrays import Numbers
        from ...numerics.exact_factors import multiply_exactly
        from ...numerics.products import Term

        middles = [Numbers.of(part) for part in self._middle()]
        products = (
            product.wide()
            for middle in middles
            for i in range(len(self.A))
            for product in multiply_exactly(middle[:, i : i + 1], self.A[i : i + 1])
        )
        terms = [Term(self.B, Numbers.of(right), Fraction(weight)) for right in sum_exactly(products)]
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:
        return (self.B.wide() @ self._middle()[0])[None], self.A.wide()[None]


def vectors_of(modules: Collection[str], vectors: Sequence[str]) -> dict[str, str]:
    """Return module -> the name of its group's vector.

    Args:
        modules: paths of all modules of the adapter.
        vectors: names of tensors, each with its group's number at the end if there are several.

    Raises:
        InputError: the order of the modules is unknown, or there are more groups than modules.
    """
    if len(vectors) == 1:
        return dict.fromkeys(modules, vectors[0])
    paths = {module: split_numbers(module) for module in modules}
    numbers = [vector.rpartition(".")[2] for vector in vectors]
    in_order = (
        sorted(vectors, key=lambda vector: int(vector.rpartition(".")[2])) if all(map(str.isdigit, numbers)) else ()
    )
    if len({text for text, _ in paths.values()}) != 1 or not len(paths) >= len(in_order) > 0:
        raise InputError(
            f"is one of {len(vectors)} vectors of groups of modules, and only the model's class tells which modules",
            culprit=vectors[0],
            remedy="merge it with peft (merge_and_unload), save the model, and `loratool extract BASE MODEL` makes an "
            "adapter of the change; weight_tying=1 in its config makes one group",
        )
    size, last = len(paths) // len(in_order), len(in_order) - 1
    ordered = sorted(paths, key=lambda module: paths[module][1])
    return {module: in_order[min(place // size, last)] for place, module in enumerate(ordered)}
