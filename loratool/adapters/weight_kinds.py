"""Kinds of weights that PEFT can adapt, with the names and shapes of their factors in an adapter.

WEIGHT_KINDS converts a weight to a stack of matrices (out, in), and gives names and shapes of the adapter's tensors
(huggingface/peft: peft/tuners/lora/layer.py). Callers handle every kind as a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.conv1d import stores_transposed
from ..architectures.experts import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from ..architectures.prefixes import module_path
from .formats.peft import DECLARED, nested
from .placed_factors import lay_A, lay_B

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightKind:
    """The shapes and names of one kind of weight and of its factors."""

    stack: Callable[[Tensor], Tensor]  # the weight -> the weight as (E, out, in)
    keys: tuple[str, str]  # the suffixes of the names of A and B
    lay: Callable[[Tensor, Tensor, Shape], tuple[Tensor, Tensor]]  # A (r, E, in), B (r, E, out), shape -> as saved


def _linear(A: Tensor, B: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return A[:, 0], B[:, 0].T


def _convolution(A: Tensor, B: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return A.reshape(len(A), *shape[1:]), B[:, 0].T.reshape(shape[0], len(A), *[1] * (len(shape) - 2))


def _experts(A: Tensor, B: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return lay_A(A.permute(1, 0, 2)), lay_B(B.permute(1, 2, 0))


_WEIGHTS = ("lora_A.weight", "lora_B.weight")

WEIGHT_KINDS: dict[str, WeightKind] = {
    "linear": WeightKind(lambda D: D.unsqueeze(0), _WEIGHTS, _linear),
    "conv1d": WeightKind(lambda D: D.T.unsqueeze(0), _WEIGHTS, _linear),  # transformers' Conv1D: (in, out)
    "conv": WeightKind(lambda D: D.flatten(1).unsqueeze(0), _WEIGHTS, _convolution),
    "embedding": WeightKind(lambda D: D.T.unsqueeze(0), ("lora_embedding_A", "lora_embedding_B"), _linear),
    "head": WeightKind(lambda D: D.unsqueeze(0), _WEIGHTS, _linear),
    "experts": WeightKind(lambda D: D, _WEIGHTS, _experts),
    "experts-turned": WeightKind(lambda D: D.mT, _WEIGHTS, _experts),  # stored as (E, in, out), as PEFT expects
}


def weight_kind(model_types: Collection[str], module: str, role: str) -> str:
    """Return the key of WEIGHT_KINDS for a weight of this role (`roles.weight_role`)."""
    if role == "experts":
        transposed = TRANSPOSED_EXPERTS.intersection(model_types) and not PEFT_TAKES_AS_PLAIN.intersection(model_types)
        return "experts-turned" if transposed else "experts"
    return "conv1d" if role == "linear" and stores_transposed(model_types, module) else role


def stack_shape(kind: str, shape: Shape) -> tuple[int, int, int]:
    """Return (E, out, in) for a weight of this kind and shape."""
    E, out, inp = WEIGHT_KINDS[kind].stack(torch.empty(shape, dtype=torch.float32, device="meta")).shape
    return E, out, inp


def factor_shapes(kind: str, shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Return the shapes of the adapter's A and B for a weight of this kind and shape."""
    E, out, inp = stack_shape(kind, shape)
    A, B = (torch.empty(rank, E, size, dtype=torch.float32, device="meta") for size in (inp, out))
    saved_A, saved_B = WEIGHT_KINDS[kind].lay(A, B, shape)
    return tuple(saved_A.shape), tuple(saved_B.shape)


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
