"""Fuse and stack low-rank factors, for readers of files that store them separately."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.prefixes import PEFT_PREFIX
from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..placed_factors import Place, lay_A, lay_B, place_A, place_B, starts
from .made_tensors import MadeTensor, made_of_bits, stored_bits

if TYPE_CHECKING:
    from ..placed_factors import Array

Today = tuple[dict[str, MadeTensor], dict[str, Any]]  # tensors and config of a file in PEFT's current form


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix, A (rank, in) and B (out, rank), or of a stack of them."""

    A: MadeTensor
    B: MadeTensor
    joined: int = 1  # number of modules that were fused, each with separate ranks


def join(parts: Sequence[tuple[Pair, slice]], rows: int) -> Pair:
    """Return the factors of one matrix of `rows` rows; each part fills some rows and has separate ranks."""
    ranks = [part.A.spec.shape[0] for part, _ in parts]
    first = parts[0][0]
    places = [
        (part, Place(start, rows_of_part)) for (part, rows_of_part), start in zip(parts, starts(ranks), strict=True)
    ]
    A = TensorSpec(first.A.spec.dtype, (sum(ranks), first.A.spec.shape[1]))
    B = TensorSpec(first.B.spec.dtype, (rows, sum(ranks)))
    return Pair(
        made_of_bits(A, lambda: place_A(((stored_bits(part.A), place) for part, place in places), A.shape)),
        made_of_bits(B, lambda: place_B(((stored_bits(part.B), place) for part, place in places), B.shape)),
        len(parts),
    )


def stack_pairs(module: str, pairs: Mapping[int, Pair], count: int, ranks: Collection[int | None]) -> Pair:
    """Return the factors of `count` experts as PEFT stacks them, with zeros for missing experts.

    A is (count * rank, in), expert by expert. B is (out, rank * count), for each rank the experts.

    Args:
        ranks: the ranks of the modules in the config; None for a missing rank.

    Raises:
        InputError: they have different ranks or shapes, or other ranks than the config's.
    """
    first = next(iter(pairs.values()))
    if any((pair.A.spec, pair.B.spec) != (first.A.spec, first.B.spec) for pair in pairs.values()):
        raise InputError("has experts of different ranks or shapes, but its factors are one stack", culprit=module)
    if len(first.A.spec.shape) != 2 or len(first.B.spec.shape) != 2 or first.A.spec.shape[0] != first.B.spec.shape[1]:
        raise InputError(
            f"A is {first.A.spec.shape} and B is {first.B.spec.shape}: not a low-rank pair", culprit=module
        )
    (rank, width), rows = first.A.spec.shape, first.B.spec.shape[0]
    if any(each is not None and each * first.joined != rank for each in ranks):
        raise InputError(
            f"has rank {rank // first.joined}, but the config says {sorted(map(str, ranks))}", culprit=module
        )

    def sides(side: str) -> Iterator[tuple[Array, Place]]:
        return ((stored_bits(getattr(pair, side)), Place(expert=number)) for number, pair in pairs.items())

    A, B = TensorSpec(first.A.spec.dtype, (count * rank, width)), TensorSpec(first.B.spec.dtype, (rows, rank * count))
    return Pair(
        made_of_bits(A, lambda: lay_A(place_A(sides("A"), (count, rank, width)))),
        made_of_bits(B, lambda: lay_B(place_B(sides("B"), (count, rows, rank)))),
        first.joined,
    )


def with_stacks(
    tensors: Mapping[str, MadeTensor],
    stacks: Mapping[str, Mapping[str, Pair]],
    count: int,
    fields: Mapping[str, Any],
) -> Today:
    """Return a file's other tensors with the stacks, and config fields that list the stacks.

    Raises:
        InputError: the config scales by the root of the rank, and fused gate and up have twice the rank.
    """
    named, ranks, alphas, alpha = dict(tensors), {}, {}, fields.get("lora_alpha")
    for stem, pairs in stacks.items():
        for parameter, pair in pairs.items():
            wrapper = f"{stem}.base_layer" if len(pairs) == 2 and parameter == "gate_up_proj" else stem
            put_tensor(named, f"{wrapper}.lora_A.weight", pair.A)
            put_tensor(named, f"{wrapper}.lora_B.weight", pair.B)
            path = f"{stem.removeprefix(PEFT_PREFIX)}.{parameter}"
            ranks[path] = pair.A.spec.shape[0] // count
            if alpha is not None:
                alphas[path] = alpha * pair.joined
            if fields.get("use_rslora") and pair.joined > 1:
                message = "has gate and up fused, but its rsLoRA scale is that of one of them"
                raise InputError(message, culprit=path)
    plain = {name.partition(".lora_A.")[0].removeprefix(PEFT_PREFIX) for name in tensors if ".lora_A." in name}
    return named, {
        **fields,
        "target_modules": sorted(plain),
        "target_parameters": sorted(ranks),
        "rank_pattern": {**{f"^{re.escape(p)}": r for p, r in ranks.items()}, **(fields.get("rank_pattern") or {})},
        "alpha_pattern": {f"^{re.escape(path)}": each for path, each in alphas.items()},
        "peft_version": "0.19.0",  # before it, PEFT took square stacks for (experts, in, out)
    }


def put_tensor(tensors: dict[str, MadeTensor], name: str, tensor: MadeTensor) -> None:
    """Add a tensor; raise InputError for a second one of the same name."""
    if name in tensors:
        raise InputError("is there twice, under this name and under its trainer's", culprit=name)
    tensors[name] = tensor
