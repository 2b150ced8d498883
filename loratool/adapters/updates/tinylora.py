"""Add a low-rank product with a small matrix between its factors, TinyLoRA: D = B (sum over i of v_i P_i) A.

Defined by `peft/tuners/tinylora/layer.py`. A and B come from the base's SVD, the P_i from a seed; the file has them all
with `save_projection`. Modules share vectors v in groups, by their number in the order of the model's modules. The
number is added to the seed, so a module's P_i tell its number where torch draws them again. They are recognized, and
never taken from the draw: another stream of a later torch is no match.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ...architectures.numbered_names import split_numbers
from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .sums import sum_exactly
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term


GROUPED = "tinylora_v"

ENOUGH = 8  # random numbers of a module are no chance match
COMPARED = 64  # of them, the first
DRAWN = 80  # torch draws 16 at once, and the last 16 anew if their number is no multiple
# type in a file -> how close its numbers are to those of the draw, which are less than 8 in size
CLOSE = {"BF16": 2.0**-5, "F16": 2.0**-8, "F32": 2.0**-16, "F64": 2.0**-16}


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


def vectors_of(
    modules: Mapping[str, str | None], vectors: Sequence[str], file: WeightsFile, seed: object
) -> dict[str, str]:
    """Return module -> the name of its group's vector.

    Args:
        modules: path of each module of the adapter -> the name of its random matrices.
        vectors: names of tensors, each with its group's number at the end if there are several.
        seed: the config's `projection_seed`.

    Raises:
        InputError: the order of the modules is unknown, or there are more groups than modules.
    """
    if len(vectors) == 1:
        return dict.fromkeys(modules, vectors[0])
    for module, name in modules.items():
        if name is None:
            TinyLoRA.require(module, {GROUPED: vectors[0]})
    ordered = _order_by_draws(modules, file, seed) or _order_by_numbers(modules)
    numbers = [vector.rpartition(".")[2] for vector in vectors]
    if not len(ordered) == len(modules) >= len(vectors) or not all(map(str.isdigit, numbers)):
        raise InputError(
            f"is one of {len(vectors)} vectors of groups of modules, and only the model's class tells which modules",
            culprit=vectors[0],
            remedy="merge it with peft (merge_and_unload), save the model, and `loratool extract BASE MODEL` makes an "
            "adapter of the change; weight_tying=1 in its config makes one group",
        )
    in_order = sorted(vectors, key=lambda vector: int(vector.rpartition(".")[2]))
    size, last = len(ordered) // len(in_order), len(in_order) - 1
    return {module: in_order[min(place // size, last)] for place, module in enumerate(ordered)}


def _order_by_numbers(modules: Collection[str]) -> list[str]:
    """Return modules in the order of the numbers in their paths; none if the paths differ in more."""
    paths = {module: split_numbers(module) for module in modules}
    alike = len({text for text, _ in paths.values()}) == 1
    return sorted(paths, key=lambda module: paths[module][1]) if alike else []


def _order_by_draws(modules: Mapping[str, str | None], file: WeightsFile, seed: object) -> list[str]:
    """Return the modules whose matrices are the draw of one number, in the order of these numbers."""
    import numpy as np

    from ...numerics.arrays import Numbers
    from ...numerics.forms import FORMS

    draws: dict[tuple[int, int], Wide] = {}  # rank, size -> the start of each number's draw
    found: dict[int, str] = {}
    for module, name in modules.items():
        spec = file.specs[str(name)]
        known = spec.dtype in CLOSE and len(spec.shape) == 3 and spec.size >= ENOUGH
        if not known or type(seed) is not int or not 0 <= seed < 2**62:
            continue
        rank, size = spec.shape[2], min(spec.size, DRAWN)
        if (rank, size) not in draws:
            draws[rank, size] = np.stack([_start(seed + number, rank, size) for number in range(len(modules))])
        stored = Numbers.empty(FORMS[spec.dtype], min(size, COMPARED))
        file.read_numbers(str(name), 0, stored.bits)
        off = np.abs(draws[rank, size][:, :COMPARED] - stored.wide()).max(axis=1)
        matches = np.flatnonzero(off <= CLOSE[spec.dtype])
        if len(matches) == 1:
            found[int(matches[0])] = module
    return [found[number] for number in sorted(found)]


def _start(seed: int, rank: int, size: int) -> Wide:
    """Return the first `size` of a module's random numbers, as `peft/tuners/tinylora/layer.py` draws them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.normal(0.0, rank**-0.5, (size,), generator=generator, dtype=torch.float32)
    start: Wide = drawn.double().numpy()
    return start
