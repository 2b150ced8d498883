"""Add a low-rank product of vectors from a shared bank, VB-LoRA (Li et al., NeurIPS 2024).

Each run of l numbers in a row of A, or in a column of B, is a weighted sum of k of the bank's vectors
(`peft/tuners/vblora/layer.py`): those of the largest logits, with the softmax of these as weights. Each weight is the
float64 number nearest to its real value. With `save_only_topk_weights` the file has no logits. It has the vectors'
numbers and all weights but the last, which is 1 minus the others. What follows from the weights is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .indices import read_indices
from .softmax import softmax
from .sums import sum_exactly
from .tucker import transposed_terms
from .update import Detail, PeftMethod, Update, UpdateSpec, finite_numbers, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import IntArray, Wide
    from ...numerics.products import Term

BANK, SIDES = "vblora_vector_bank", ("A", "B")
LOGITS = tuple(f"vblora_logits_{side}" for side in SIDES)
INDICES, WEIGHTS = (tuple(f"{each}_topk_{part}" for each in LOGITS) for part in ("indices", "weights"))
STORED = (*INDICES, *WEIGHTS)


@dataclass(frozen=True)
class TopK(Detail):
    """How many of the bank's vectors a cell sums."""

    count: int

    @property
    def hashed(self) -> tuple[int, ...]:
        return (self.count,)


@dataclass(frozen=True)
class VBLoRA(Update):
    """An update of VB-LoRA, with the vectors that it takes from the bank."""

    vectors_A: Numbers  # (r, in / l, k, l)
    weights_A: Numbers  # (r, in / l, k), or without the last of k
    vectors_B: Numbers  # (out / l, r, k, l)
    weights_B: Numbers  # (out / l, r, k), or without the last of k

    kind = "vblora"
    roles = (BANK,)
    optional = (*LOGITS, *STORED)
    peft = PeftMethod("VBLORA", {role: role for role in optional}, shared=roles)

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        A, B = _cells(spec.specs)
        length = spec.specs[BANK].shape[1]
        return (B[0] * length, A[1] * length)

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return _cells(spec.specs)[0][0]

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        return True

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        wanted = LOGITS if roles.keys() & set(LOGITS) else STORED
        for role in (*wanted, BANK):
            if role not in roles:
                other = next(iter(roles.values()))
                raise InputError(f"has no partner: the {role} of {module} is missing", culprit=other)
        beside = next((name for role, name in roles.items() if role not in (*wanted, BANK, "base")), None)
        if beside:
            raise InputError("is there beside logits, which it would contradict", culprit=beside)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B = _cells(specs)
        bank = specs[BANK].shape
        good = len(A) == len(B) == 3 and len(bank) == 2 and A[0] == B[1] > 0 and A[2] == B[2] > 0 and bank[1] > 0
        if LOGITS[0] in specs:
            good = good and A[2] == bank[0]
        else:
            stored = (specs[role].shape for role in WEIGHTS)
            good = good and all(
                weights == (*cells[:2], cells[2] - 1) for weights, cells in zip(stored, (A, B), strict=True)
            )
        if not good:
            shapes = ", ".join(f"{role} is {spec.shape}" for role, spec in specs.items())
            raise InputError(f"{shapes}: they are not of one rank and one bank", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, cls.rank(spec))
        if LOGITS[0] not in spec.specs:
            return spec
        count, vectors = config.peft.get("topk"), spec.specs[BANK].shape[0]
        if type(count) is not int or not 1 <= count <= vectors:
            raise InputError(
                f"the config's topk is {brief(count)}, not a number of the bank's {vectors} vectors",
                culprit=spec.module,
                remedy="put its adapter_config.json beside it",
            )
        return replace(spec, detail=TopK(count))

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> Update:
        names = {role: name for role, name in spec.tensors.items() if role not in INDICES}
        numbers = finite_numbers(names, file, adapter)
        bank = numbers[BANK]
        for side, logits in zip(SIDES, LOGITS, strict=True):
            if isinstance(spec.detail, TopK):
                indices, weights = _largest(numbers[logits], spec.detail.count, spec.tensors[logits])
            else:
                indices = read_indices(file, spec.tensors[f"{logits}_topk_indices"], len(bank))
                weights = numbers[f"{logits}_topk_weights"]
            numbers |= {f"vectors_{side}": bank[indices], f"weights_{side}": weights}
        return cls.make(spec, numbers)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> VBLoRA:
        return cls(*(tensors[f"{part}_{side}"] for side in SIDES for part in ("vectors", "weights")))

    def _sides(self) -> tuple[list[Wide], list[Wide]]:
        """Return B and A, each as arrays with the exact sum."""
        A, B = (
            sum_exactly(_summands(vectors, weights))
            for vectors, weights in ((self.vectors_A, self.weights_A), (self.vectors_B, self.weights_B))
        )
        rank = len(self.weights_A)
        return [x.swapaxes(1, 2).reshape(-1, rank) for x in B], [x.reshape(rank, -1) for x in A]

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.arrays import Numbers
        from ...numerics.products import Term

        lefts, rights = ([Numbers.of(part) for part in side] for side in self._sides())
        terms = [Term(left, right, Fraction(weight)) for left in lefts for right in rights]
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:
        (B, *_), (A, *_) = self._sides()
        return B[None], A[None]


def _cells(specs: Mapping[str, TensorSpec]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A's and of B's logits or indices."""
    A, B = (specs[role].shape for role in (LOGITS if LOGITS[0] in specs else INDICES))
    return A, B


def _largest(logits: Numbers, count: int, name: str) -> tuple[IntArray, Numbers]:
    """Return the places of the `count` largest logits of each cell, and their softmax.

    Raises:
        InputError: the last of them equals another logit, so that PEFT's choice is not defined.
    """
    import numpy as np

    from ...numerics.arrays import Numbers

    values = logits.wide()
    order = np.argsort(-values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    if count < values.shape[2] and (ordered[:, :, count - 1] == ordered[:, :, count]).any():
        raise InputError(
            f"has equal logits, of which only some are among the {count} largest: no choice between them is defined",
            culprit=name,
            remedy="save it with peft with save_only_topk_weights=True in its config, which stores the choice",
        )
    cells = ordered[:, :, :count].reshape(-1, count).tolist()
    weights = np.array([softmax(cell) for cell in cells]).reshape(*values.shape[:2], count)
    return order[:, :, :count], Numbers.of(weights)


def _summands(vectors: Numbers, weights: Numbers) -> Iterator[Wide]:
    """Yield arrays with the sum of w_j v_j. If the last w is not there, it is `last + sum of w_j (v_j - last)`."""
    from ...numerics.exact_factors import multiply_exactly

    count, stored = vectors.shape[2], weights.shape[2]
    last = vectors[:, :, count - 1]
    if stored < count:
        yield last.wide()
    for j in range(stored):
        weight = weights[:, :, j, None]
        yield from (part.wide() for part in multiply_exactly(weight, vectors[:, :, j]))
        if stored < count:
            yield from (-part.wide() for part in multiply_exactly(weight, last))
