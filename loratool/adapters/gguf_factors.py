"""Convert factors of transformers' modules to those of GGUF's tensors, and back.

Factors are computed when they are loaded. Only rows of B and columns of A are moved; no number changes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..architectures.experts import PEFT_TAKES_AS_PLAIN
from ..errors import InputError
from ..files.dtypes import TORCH_FLOATS, TensorSpec, safetensors_name
from .adapter import Adapter
from .gguf_parts import EMBEDDING, STACK, GgufModel, Part
from .placed_factors import Place, have_one_A, place_pairs, starts
from .updates.dora import DoRA
from .updates.experts import Experts
from .updates.low_rank import LowRank
from .updates.update import Stack, UpdateSpec

if TYPE_CHECKING:
    from torch import Tensor

    from .placed_factors import Pair


@dataclass(frozen=True)
class MadeUpdate:
    """An update under its new name, with the function that computes its factors."""

    module: str
    source: UpdateSpec  # gives the scale and, with others, the types
    shape: tuple[int, int, int, int]  # experts, out, rank, in
    dtype: str
    load: Callable[[], Pair]
    detail: Stack | None
    transposed: bool | None
    magnitude: Callable[[], Tensor] | None = None  # of DoRA: one number for each row
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


def _pair(adapter: Adapter, update: UpdateSpec) -> Pair:
    """Load factors in their stored types as stacks of matrices; a linear layer is a stack of one."""
    loaded = adapter.load(update.cls.without_norm(update))
    assert isinstance(loaded, LowRank | Experts)
    E, rank = update.experts, update.rank
    return loaded.A.view(E, rank, -1), loaded.B.view(-1, rank, E).permute(2, 0, 1)


def _dtype(updates: Sequence[UpdateSpec]) -> str:
    """Return the type that can hold the factors of all updates."""
    import torch

    from .stacked import factor_dtypes

    stored = [dtype for update in updates for dtype in factor_dtypes(update)]
    return safetensors_name(functools.reduce(torch.promote_types, stored))


def _typed(pair: Pair, dtype: str) -> Pair:
    """Return factors in one type that holds both: `dtype`, or the type of computed numbers."""
    import torch

    wanted = functools.reduce(torch.promote_types, [side.dtype for side in pair], getattr(torch, TORCH_FLOATS[dtype]))
    return pair[0].to(wanted), pair[1].to(wanted)


def part_of(adapter: Adapter, update: UpdateSpec, part: Part, model: GgufModel) -> MadeUpdate:
    """Return the update of a GGUF tensor that has some rows of a module."""
    E, out, width = (update.experts, *update.shape[-2:])
    is_swapped = _labels_are_swapped(adapter, update, part, model)
    out, width = (width, out) if is_swapped else (out, width)
    numbers = part.numbers(model.facts, out, update.module)
    columns, heads = part.columns(model.facts, width, update.module), model.facts.heads
    dtype = _dtype([update])

    def load() -> Pair:
        A, B = _typed(_pair(adapter, update), dtype)
        A, B = (B.mT, A.mT) if is_swapped else (A, B)
        if part.weight.heads:
            A, B = A.expand(heads, -1, -1), B[:, numbers].view(heads, -1, B.shape[2])
            return (B.mT, A.mT) if part.weight.heads_transposed else (A, B)
        return A if columns is None else A[:, :, columns], B[:, numbers]

    detail = Stack(E, transposed=False) if update.cls.stack else None
    shape = E, len(numbers), update.rank, width
    if part.weight.heads:  # one matrix of transformers
        sides = len(numbers) // heads, width
        out, width = reversed(sides) if part.weight.heads_transposed else sides
        detail, shape = Stack(heads, transposed=False), (heads, out, update.rank, width)

    def magnitude() -> Tensor:
        return adapter.file.tensor(update.tensors["magnitude"]).flatten()[numbers]

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

    def load() -> Pair:
        pairs = ((_typed(_pair(adapter, u), dtype), Place(expert=number)) for number, (_, u) in single.items())
        return place_pairs(pairs, shape)

    return MadeUpdate(part.module, first, shape, dtype, load, Stack(experts, transposed=False), False)


def joined_parts(
    adapter: Adapter, path: str, members: Sequence[tuple[Part, UpdateSpec]], parts: Sequence[Part], model: GgufModel
) -> MadeUpdate:
    """Return the module of transformers that GGUF tensors have the rows of; missing rows are zero.

    If the tensors share one A, as gate and up of one matrix do, the result has that A; else the ranks are concatenated.
    """
    (_, first), updates = members[0], [update for _, update in members]
    E, (out, width) = first.experts, first.shape[-2:]
    for update in updates:
        if update.cls is not first.cls or update.shape != first.shape:
            raise InputError(f"is {update.shape}, and {first.module} {first.shape}", culprit=update.module)
        if update.scale != first.scale:
            raise InputError(
                f"and {first.module} are one matrix in transformers, but have the scales {update.scale:g} and "
                f"{first.scale:g}",
                culprit=update.module,
                remedy="merge it into a GGUF file",
            )
    rows = out * members[0][0].count
    alike = have_one_A(adapter.file, [update.tensors["A"] for update in updates])
    firsts = starts([update.rank for update in updates], alike)
    places = [
        Place(start, part.numbers(model.facts, rows, update.module))
        for (part, update), start in zip(members, firsts, strict=True)
    ]
    columns = members[0][0].columns(model.facts, width, first.module)
    rank, dtype = first.rank if alike else sum(update.rank for update in updates), _dtype(updates)

    def load() -> Pair:
        import torch

        pairs = (_typed(_pair(adapter, update), dtype) for update in updates)
        A, B = place_pairs(zip(pairs, places, strict=True), (E, rows, rank, width))
        if columns is not None:
            ours, A = A, torch.empty_like(A)
            A[:, :, columns] = ours
        return (B.mT, A.mT) if swapped else (A, B)

    # a layer of transformers may store (in, out) although GGUF does not; PEFT takes Llama 4's for (out, in) anyway
    transposed = members[0][0].weight.transposed
    swapped = first.cls.stack and transposed and bool(PEFT_TAKES_AS_PLAIN.intersection(model.model_types))
    detail = Stack(E, transposed=transposed and not swapped) if first.cls.stack else None
    shape = (E, width, rank, rows) if swapped else (E, rows, rank, width)
    return MadeUpdate(path, first, shape, dtype, load, detail, True if first.transposed else None)
