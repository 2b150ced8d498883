"""A change of a weight as the factors of an adapter, for every kind of weight that PEFT has factors for.

What differs between the kinds stands in the table KINDS: how the weight is a stack of matrices (out, in), and what the
adapter's tensors are called and how they lie (formats.md 1.3 and 1.5 of our references; peft/tuners/lora/layer.py). The
factors of all kinds wait in one spool, triplet by triplet, so that the first k of them are the best of rank k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.conv1d import stores_transposed
from ..architectures.prefixes import module_path
from ..architectures.renames import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from .formats.peft import DECLARED
from .formats.peft_write import nested

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightKind:
    """stack: the weight as (E, out, in); keys: the ends of the names of A and B; lay: (A (r, E, in), B (r, E, out), the
    weight's shape) -> the tensors under these names.
    """

    stack: Callable[[Tensor], Tensor]
    keys: tuple[str, str]
    lay: Callable[[Tensor, Tensor, Shape], tuple[Tensor, Tensor]]


def _linear(A: Tensor, B: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return A[:, 0], B[:, 0].T


def _convolution(A: Tensor, B: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return A.reshape(len(A), *shape[1:]), B[:, 0].T.reshape(shape[0], len(A), *[1] * (len(shape) - 2))


def _experts(A: Tensor, B: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """An expert's rows of A together; in B's columns the expert's number runs fastest."""
    return A.permute(1, 0, 2).reshape(-1, A.shape[2]), B.permute(2, 0, 1).reshape(B.shape[2], -1)


_WEIGHTS = ("lora_A.weight", "lora_B.weight")


WEIGHT_KINDS: dict[str, WeightKind] = {
    "linear": WeightKind(lambda D: D.unsqueeze(0), _WEIGHTS, _linear),
    "conv1d": WeightKind(lambda D: D.T.unsqueeze(0), _WEIGHTS, _linear),  # transformers' Conv1D: (in, out)
    "conv": WeightKind(lambda D: D.flatten(1).unsqueeze(0), _WEIGHTS, _convolution),
    "embedding": WeightKind(lambda D: D.T.unsqueeze(0), ("lora_embedding_A", "lora_embedding_B"), _linear),
    "head": WeightKind(lambda D: D.unsqueeze(0), _WEIGHTS, _linear),
    "experts": WeightKind(lambda D: D, _WEIGHTS, _experts),
    "experts-turned": WeightKind(lambda D: D.mT, _WEIGHTS, _experts),  # stored as (E, in, out), and PEFT knows
}


def weight_kind(model_types: Collection[str], module: str, role: str) -> str:
    """A key of KINDS for a weight of this role (`architectures.roles`)."""
    if role == "experts":
        turned = TRANSPOSED_EXPERTS.intersection(model_types) and not PEFT_TAKES_AS_PLAIN.intersection(model_types)
        return "experts-turned" if turned else "experts"
    return "conv1d" if role == "linear" and stores_transposed(model_types, module) else role


def stack_shape(kind: str, shape: Shape) -> tuple[int, int, int]:
    """(E, out, in) of a weight's stack."""
    E, out, inp = WEIGHT_KINDS[kind].stack(torch.empty(shape, dtype=torch.float32, device="meta")).shape
    return E, out, inp


def factor_shapes(kind: str, shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Of the adapter's A and B for a weight of this shape."""
    E, out, inp = stack_shape(kind, shape)
    A, B = (torch.empty(rank, E, size, dtype=torch.float32, device="meta") for size in (inp, out))
    laid = WEIGHT_KINDS[kind].lay(A, B, shape)
    return tuple(laid[0].shape), tuple(laid[1].shape)


@dataclass(frozen=True)
class FactorLayout:
    """Where an adapter has the factors: the ranks of modules and of bare parameters (experts); wrapper -> (the weight
    whose factors it has, whether turned: an embedding's, for the head that is the same matrix).
    """

    modules: dict[str, int]
    parameters: dict[str, int]
    wrappers: dict[str, tuple[str, bool]]


def locate_factors(kinds: Mapping[str, str], ranks: Mapping[str, int], heads: Mapping[str, str]) -> FactorLayout:
    """kinds, ranks: of each weight; of rank 0 it has none. heads: embedding -> the head that is the same matrix."""
    layout = FactorLayout({}, {}, {})
    stacks: dict[str, list[str]] = {}
    for name, rank in ranks.items():
        if not rank:
            continue
        if kinds[name].startswith("experts"):
            layout.parameters[name] = rank
            stacks.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
            continue
        for each, turned in ((name, False), *([(heads[name], True)] if name in heads else [])):
            layout.modules[module_path(each)] = rank
            layout.wrappers[module_path(each)] = (name, turned)
    for module, names in stacks.items():
        declared = (*DECLARED, *sorted(set(names) - set(DECLARED)))
        for parameter, wrapper in nested(module, names, declared).items():
            layout.wrappers[wrapper] = (f"{module}.{parameter}", False)
    return layout
