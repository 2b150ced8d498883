"""Convert factors of transformers' modules to those of GGUF's tensors, and back.

Factors are computed when they are loaded. Only rows of B and columns of A are moved; no number changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..architectures.experts import PEFT_TAKES_AS_PLAIN
from ..errors import InputError
from ..files.dtypes import TensorSpec
from .adapter import Adapter
from .gguf_parts import EMBEDDING, STACK, GgufModel, Part
from .placed_factors import Place, have_one_A, lay_A, lay_B, place_pairs, starts
from .updates.dora import DoRA
from .updates.experts import Experts
from .updates.low_rank import LowRank
from .updates.update import Stack, UpdateSpec

if TYPE_CHECKING:
    from ..numerics.arrays import Numbers
    from ..numerics.forms import Form
    from .placed_factors import Array, Pair


@dataclass(frozen=True)
class MadeUpdate:
    """An update under its new name, with the function that computes its factors."""

    module: str
    source: UpdateSpec  # gives the scale and, with others, the types
    shape: tuple[int, int, int, int]  # experts, out, rank, in
    dtype: str
    load: Callable[[], dict[str, Numbers]]  # A and B in PEFT's layout, by role
    detail: Stack | None
    transposed: bool | None
    magnitude: Callable[[], Numbers] | None = None  # of DoRA: one number for each row
    rows: Sequence[int] = ()  # rows of each matrix of `source`, if not all

    def spec(self) -> UpdateSpec:
        key = f"{self.module}.weight"
        E, out, rank, width = self.shape
        cls = Experts if self.detail else LowRank
        specs = {"A": TensorSpec(self.dtype, (E * rank, width)), "B": TensorSpec(self.dtype, (out, rank * E))}
        tensors = {"A": f"{key}.lora_a", "B": f"{key}.lora_b"}
        scale, base = self.source.scale, self.source.base
        spec = UpdateSpec(cls, self.module, tensors, specs, scale, self.transposed, self.detail, base)
        if self.magnitude is None:
            return spec
        stored = self.source.specs["magnitude"]
        return DoRA.of(spec, f"{key}.magnitude", TensorSpec(stored.dtype, (out,)), along_inputs=False)


def _dtype(updates: Sequence[UpdateSpec]) -> str:
    """Return the type that can hold the factors of all updates."""
    from ..numerics.forms import holding
    from .stacked import factor_forms

    return holding(*(form for update in updates for form in factor_forms(update))).name


def _pairs(adapter: Adapter, updates: Sequence[UpdateSpec], dtype: str) -> tuple[list[Pair], Form]:
    """Load the bits of factors as stacks of matrices, in one form that holds all; a linear layer is a stack of one.

    The form is that of `dtype`, or a wider one of computed numbers.
    """
    from ..numerics.arrays import recast
    from ..numerics.forms import FORMS, holding

    sides: list[tuple[Numbers, Numbers]] = []
    for update in updates:
        loaded = adapter.load(update.cls.without_norm(update))
        assert isinstance(loaded, LowRank | Experts)
        E, rank = update.experts, update.rank
        B = loaded.B.reshape(-1, rank, E)
        sides.append((loaded.A.reshape(E, rank, -1), replace(B, bits=B.bits.transpose(2, 0, 1))))
    form = holding(FORMS[dtype], *(side.form for pair in sides for side in pair))
    return [(recast(A, form).bits, recast(B, form).bits) for A, B in sides], form


def _laid(A: Array, B: Array, form: Form) -> dict[str, Numbers]:
    from ..numerics.arrays import Numbers

    return {"A": Numbers(lay_A(A), form), "B": Numbers(lay_B(B), form)}


def part_of(adapter: Adapter, update: UpdateSpec, part: Part, model: GgufModel) -> MadeUpdate:
    """Return the update of a GGUF tensor that has some rows of a module."""
    E, out, width = (update.experts, *update.shape[-2:])
    is_swapped = _labels_are_swapped(adapter, update, part, model)
    out, width = (width, out) if is_swapped else (out, width)
    numbers = part.numbers(model.facts, out, update.module)
    columns, heads = part.columns(model.facts, width, update.module), model.facts.heads
    dtype = _dtype([update])

    def load() -> dict[str, Numbers]:
        import numpy as np

        from ..numerics.linalg import adjoint

        ((A, B),), form = _pairs(adapter, [update], dtype)
        A, B = (adjoint(B), adjoint(A)) if is_swapped else (A, B)
        if part.weight.heads:
            A, B = np.broadcast_to(A, (heads, *A.shape[1:])), B[:, numbers].reshape(heads, -1, B.shape[2])
            A, B = (adjoint(B), adjoint(A)) if part.weight.heads_transposed else (A, B)
            return _laid(A, B, form)
        return _laid(A if columns is None else A[:, :, columns], B[:, numbers], form)

    detail = Stack(E, transposed=False) if update.cls.stack else None
    shape = E, len(numbers), update.rank, width
    if part.weight.heads:  # one matrix of transformers
        sides = len(numbers) // heads, width
        out, width = reversed(sides) if part.weight.heads_transposed else sides
        detail, shape = Stack(heads, transposed=False), (heads, out, update.rank, width)

    def magnitude() -> Numbers:
        return adapter.file.numbers(update.tensors["magnitude"]).reshape(-1)[numbers]

    decomposed, rows = magnitude if update.cls is DoRA else None, () if is_swapped else numbers
    return MadeUpdate(part.module, update, shape, dtype, load, detail, part.module == EMBEDDING, decomposed, rows)


def _labels_are_swapped(adapter: Adapter, update: UpdateSpec, part: Part, model: GgufModel) -> bool:
    """Return whether A and B are those of the transposed matrix.

    PEFT up to 0.18 took every stack of experts for (experts, in, out), and still does so for Llama 4's (PR 3083). The
    model's width shows which side is which, also for an embedding that a format stores as a linear layer.
    """
    out, width = update.shape[-2:]
    ends_in_model = part.module == EMBEDDING or part.module.endswith(f"down{STACK}")
    if not (update.cls.stack or part.module == EMBEDDING) or not model.width or update.transposed:
        return False
    inner, outer = (out, width) if ends_in_model else (width, out)
    if model.width not in (inner, outer):
        raise InputError(
            f"of {adapter.name} is {update.shape}: no side has the model's width {model.width}",
            culprit=update.module,
        )
    version = re.match(r"0\.(\d+)", str(adapter.config.peft.get("peft_version")))
    if inner == outer and version and int(version[1]) < 19 and not part.weight.transposed:
        raise InputError(
            f"of {adapter.name} has square experts and was written by PEFT {version[0]}, which took them as (in, out)",
            culprit=update.module,
            remedy="merge it into the model in transformers' format",
        )
    return inner != model.width


def stack_of_singles(adapter: Adapter, single: Mapping[int, tuple[Part, UpdateSpec]], experts: int) -> MadeUpdate:
    """Return the stack of single experts; missing experts and ranks are zero."""
    (part, first), *_ = single.values()
    updates = [update for _, update in single.values()]
    for update in updates:
        if update.shape != first.shape:
            raise InputError(f"is {update.shape}, and {first.module} {first.shape}", culprit=update.module)
        if update.scale != first.scale:
            raise InputError(
                f"has the scale {update.scale:g}, and {first.module}, of the same stack, {first.scale:g}",
                culprit=update.module,
                remedy="convert it with --plain first, which puts the scales into the factors",
            )
    shape, dtype = (experts, first.shape[0], max(update.rank for update in updates), first.shape[1]), _dtype(updates)

    def load() -> dict[str, Numbers]:
        pairs, form = _pairs(adapter, updates, dtype)
        places = (Place(expert=number) for number in single)
        return _laid(*place_pairs(zip(pairs, places, strict=True), shape), form)

    return MadeUpdate(part.module, first, shape, dtype, load, Stack(experts, transposed=False), False)


def joined_parts(
    adapter: Adapter, path: str, members: Sequence[tuple[Part, UpdateSpec]], parts: Sequence[Part], model: GgufModel
) -> MadeUpdate:
    """Return the module of transformers that GGUF tensors have the rows of; missing rows are zero.

    If the tensors share one A, as gate and up of one matrix do, the result has that A; else the ranks are concatenated.
    """
    (_, first), updates = members[0], [update for _, update in members]
    E, width = first.experts, first.shape[-1]
    rows, *others = (part.whole(model.facts, update.shape[-2]) for part, update in members)
    for update, whole in zip(updates[1:], others, strict=True):
        if update.cls is not first.cls or whole != rows or (update.experts, update.shape[-1]) != (E, width):
            raise InputError(f"is {update.shape}, and {first.module} {first.shape}", culprit=update.module)
        if update.scale != first.scale:
            raise InputError(
                f"and {first.module} are one matrix in transformers, but have the scales {update.scale:g} and "
                f"{first.scale:g}",
                culprit=update.module,
                remedy="merge it into a GGUF file",
            )
    alike = have_one_A(adapter.file, [update.tensors["A"] for update in updates])
    firsts = starts([update.rank for update in updates], alike)
    places = [
        Place(start, part.numbers(model.facts, rows, update.module))
        for (part, update), start in zip(members, firsts, strict=True)
    ]
    columns = members[0][0].columns(model.facts, width, first.module)
    rank, dtype = first.rank if alike else sum(update.rank for update in updates), _dtype(updates)

    def load() -> dict[str, Numbers]:
        import numpy as np

        from ..numerics.linalg import adjoint

        pairs, form = _pairs(adapter, updates, dtype)
        A, B = place_pairs(zip(pairs, places, strict=True), (E, rows, rank, width))
        if columns is not None:
            ours, A = A, np.empty_like(A)
            A[:, :, columns] = ours
        A, B = (adjoint(B), adjoint(A)) if swapped else (A, B)
        return _laid(A, B, form)

    # a layer of transformers may store (in, out) although GGUF does not; PEFT takes Llama 4's for (out, in) anyway
    transposed = members[0][0].weight.transposed
    swapped = first.cls.stack and transposed and bool(PEFT_TAKES_AS_PLAIN.intersection(model.model_types))
    detail = Stack(E, transposed=transposed and not swapped) if first.cls.stack else None
    shape = (E, width, rank, rows) if swapped else (E, rows, rank, width)
    return MadeUpdate(path, first, shape, dtype, load, detail, True if first.transposed else None)
