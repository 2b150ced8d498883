"""Kinds of weights that PEFT can adapt, with the names and shapes of their factors in an adapter.

WEIGHT_KINDS converts a weight to a stack of matrices (out, in), and gives names and shapes of the adapter's tensors
(huggingface/peft: peft/tuners/lora/layer.py). Callers handle every kind as a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..architectures.conv1d import stores_transposed
from ..architectures.experts import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from ..architectures.prefixes import module_path
from ..numerics.arrays import Array
from ..numerics.linalg import adjoint
from .formats.peft import DECLARED, nested

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightKind:
    """The layout of one kind of weight, and the names of its factors."""

    stack: Callable[[Array], Array]  # the weight -> the weight as (E, out, in)
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")  # the suffixes of the names of A and B


WEIGHT_KINDS: dict[str, WeightKind] = {
    "linear": WeightKind(lambda D: D[None]),
    "conv1d": WeightKind(lambda D: adjoint(D)[None]),  # transformers' Conv1D: (in, out)
    "conv": WeightKind(lambda D: D.reshape(1, len(D), math.prod(D.shape[1:]))),
    "embedding": WeightKind(lambda D: adjoint(D)[None], ("lora_embedding_A", "lora_embedding_B")),
    "head": WeightKind(lambda D: D[None]),
    "experts": WeightKind(lambda D: D),
    "experts-turned": WeightKind(adjoint),  # stored as (E, in, out), as PEFT expects
}


def weight_kind(model_types: Collection[str], module: str, role: str) -> str:
    """Return the key of WEIGHT_KINDS for a weight of this role (`roles.weight_role`)."""
    if role == "experts":
        transposed = TRANSPOSED_EXPERTS.intersection(model_types) and not PEFT_TAKES_AS_PLAIN.intersection(model_types)
        return "experts-turned" if transposed else "experts"
    return "conv1d" if role == "linear" and stores_transposed(model_types, module) else role


def stack_shape(kind: str, shape: Shape) -> tuple[int, int, int]:
    """Return (E, out, in) for a weight of this kind and shape."""
    E, out, inp = WEIGHT_KINDS[kind].stack(np.broadcast_to(_NUMBER, shape)).shape  # one number in memory
    return E, out, inp


_NUMBER = np.empty(())


def factor_shapes(kind: str, shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Return the shapes of the adapter's A and B for a weight of this kind and shape."""
    E, out, inp = stack_shape(kind, shape)
    if kind == "conv":
        return (rank, *shape[1:]), (out, rank, *[1] * (len(shape) - 2))
    return (E * rank, inp), (out, rank * E)  # expert by expert, and for each rank the experts


def lay_factors(kind: str, A: Array, B: Array, shape: Shape) -> tuple[Array, Array]:
    """Return A (r, E, in) and B (r, E, out) of a weight of this shape as an adapter stores them."""
    saved_A, saved_B = factor_shapes(kind, shape, len(A))
    return A.swapaxes(0, 1).reshape(saved_A), B.transpose(2, 0, 1).reshape(saved_B)


@dataclass(frozen=True)
class FactorLayout:
    """The modules and parameters of an adapter that have factors."""

    modules: dict[str, int]  # module -> rank
    parameters: dict[str, int]  # parameter that PEFT's config lists by name (experts) -> rank
    wrappers: dict[str, tuple[str, bool]]  # PEFT's wrapper -> (weight, transposed: as head of an embedding)


def locate_factors(
    kinds: Mapping[str, str],
    ranks: Mapping[str, int],
    uses: Mapping[str, Sequence[tuple[str, bool]]],
    bare: Collection[str],
) -> FactorLayout:
    """List the modules and parameters that an adapter wraps.

    Args:
        kinds: weight -> key of WEIGHT_KINDS.
        ranks: weight -> rank; a weight of rank 0 gets no factors.
        uses: weight -> the names under which it gets factors -> whether the factors are transposed there.
        bare: the weights that PEFT's config lists as parameters.
    """
    layout = FactorLayout({}, {}, {})
    stacks: dict[str, dict[str, str]] = {}  # module -> its parameter -> the weight
    for name, rank in ranks.items():
        if not rank:
            continue
        for weight, transposed in uses.get(name, ((name, False),)):
            if name in bare:
                layout.parameters[weight] = rank
                stacks.setdefault(weight.rpartition(".")[0], {})[weight.rpartition(".")[2]] = name
            else:
                layout.modules[module_path(weight)] = rank
                layout.wrappers[module_path(weight)] = (name, transposed)
    for module, names in stacks.items():
        declared = (*DECLARED, *sorted(names.keys() - set(DECLARED)))
        for parameter, wrapper in nested(module, list(names), declared).items():
            layout.wrappers[wrapper] = (names[parameter], False)
    return layout
