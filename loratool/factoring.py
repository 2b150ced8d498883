"""A change of a weight as the factors of an adapter, for every kind of weight that PEFT has factors for.

What differs between the kinds stands in the table KINDS: how the weight is a stack of matrices (out, in), and what the
adapter's tensors are called and how they lie (formats.md 1.3 and 1.5 of our references; peft/tuners/lora/layer.py). The
factors of all kinds wait in one spool, triplet by triplet, so that the first k of them are the best of rank k.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .architectures.conv1d import stores_transposed
from .architectures.renames import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from .architectures.wrappers import module_of
from .fileio import open_scratch, read_into, write_at
from .formats.peft import DECLARED
from .formats.peft_write import nested
from .numerics.factors import effective_rank
from .numerics.svd import truncated_svds
from .ranks import Spectrum

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
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
KINDS: dict[str, Kind] = {
    "linear": Kind(lambda D: D.unsqueeze(0), _WEIGHTS, _linear),
    "conv1d": Kind(lambda D: D.T.unsqueeze(0), _WEIGHTS, _linear),  # transformers' Conv1D: (in, out)
    "conv": Kind(lambda D: D.flatten(1).unsqueeze(0), _WEIGHTS, _convolution),
    "embedding": Kind(lambda D: D.T.unsqueeze(0), ("lora_embedding_A", "lora_embedding_B"), _linear),
    "head": Kind(lambda D: D.unsqueeze(0), _WEIGHTS, _linear),
    "experts": Kind(lambda D: D, _WEIGHTS, _experts),
    "experts-turned": Kind(lambda D: D.mT, _WEIGHTS, _experts),  # stored as (E, in, out), and PEFT knows
}


def kind_of(model_types: Collection[str], module: str, role: str) -> str:
    """A key of KINDS for a weight of this role (`architectures.roles`)."""
    if role == "experts":
        turned = TRANSPOSED_EXPERTS.intersection(model_types) and not PEFT_TAKES_AS_PLAIN.intersection(model_types)
        return "experts-turned" if turned else "experts"
    return "conv1d" if role == "linear" and stores_transposed(model_types, module) else role


def stack_sizes(kind: str, shape: Shape) -> tuple[int, int, int]:
    """(E, out, in) of a weight's stack."""
    E, out, inp = KINDS[kind].stack(torch.empty(shape, dtype=torch.float32, device="meta")).shape
    return E, out, inp


def factor_shapes(kind: str, shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Of the adapter's A and B for a weight of this shape."""
    E, out, inp = stack_sizes(kind, shape)
    A, B = (torch.empty(rank, E, size, dtype=torch.float32, device="meta") for size in (inp, out))
    laid = KINDS[kind].lay(A, B, shape)
    return tuple(laid[0].shape), tuple(laid[1].shape)


@dataclass(frozen=True)
class Layout:
    """Where an adapter has the factors: the ranks of modules and of bare parameters (experts); wrapper -> (the weight
    whose factors it has, whether turned: an embedding's, for the head that is the same matrix).
    """

    modules: dict[str, int]
    parameters: dict[str, int]
    wrappers: dict[str, tuple[str, bool]]


def lay_out(kinds: Mapping[str, str], ranks: Mapping[str, int], heads: Mapping[str, str]) -> Layout:
    """kinds, ranks: of each weight; of rank 0 it has none. heads: embedding -> the head that is the same matrix."""
    layout = Layout({}, {}, {})
    stacks: dict[str, list[str]] = {}
    for name, rank in ranks.items():
        if not rank:
            continue
        if kinds[name].startswith("experts"):
            layout.parameters[name] = rank
            stacks.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
            continue
        for each, turned in ((name, False), *([(heads[name], True)] if name in heads else [])):
            layout.modules[module_of(each)] = rank
            layout.wrappers[module_of(each)] = (name, turned)
    for module, names in stacks.items():
        declared = (*DECLARED, *sorted(set(names) - set(DECLARED)))
        for parameter, wrapper in nested(module, names, declared).items():
            layout.wrappers[wrapper] = (f"{module}.{parameter}", False)
    return layout


@dataclass(frozen=True)
class Factored:
    """What is known of a change's factors. at: where they lie in the spool; sizes: (E, out, in); known: triplets there.

    gap: of the computed rank, `exact`, `certified` or an estimate, as `how` says.
    """

    kind: str
    shape: Shape
    sizes: tuple[int, int, int]
    known: int
    at: int
    spectrum: Spectrum
    gap: float
    how: str

    @property
    def full(self) -> int:
        return min(self.sizes[1:])


class FactorSpool:
    """Factors in a temporary file without a name, float32, each side with the root of its singular values."""

    def __init__(self, folder: Path, seed: int, certify: bool) -> None:
        self._file = open_scratch(folder)
        self._end, self._seed, self._certify = 0, seed, certify

    def close(self) -> None:
        self._file.close()

    def add(self, name: str, kind: str, D: Tensor, rank: int, cost: int) -> Factored:
        """The first `rank` triplets of a change D, of the weight's shape, and float32. cost: parameters a rank."""
        stack = KINDS[kind].stack(D)
        E, out, inp = stack.shape
        generators = [self._generator(f"{name} {e}", D) for e in range(E)]
        found = truncated_svds(stack, rank, generators, self._certify)
        known, total = max(len(each.S) for each in found), math.fsum(svd.total for svd in found)
        A, B = torch.zeros(known, E, inp, dtype=torch.float32), torch.zeros(known, E, out, dtype=torch.float32)
        squares = torch.zeros(known, dtype=torch.float64)
        for e, svd in enumerate(found):
            k, root = len(svd.S), svd.S.sqrt()
            A[:k, e], B[:k, e] = (svd.V.double() * root).T.float().cpu(), (svd.U.double() * root).T.float().cpu()
            squares[:k] += svd.S.square().cpu()
        at = self._end
        for side in (A, B) if known else ():
            write_at(self._file, side.view(torch.uint8).numpy().data.cast("B"), self._end)
            self._end += side.nbytes
        whole = all(len(svd.S) < min(rank, out, inp) or rank >= min(out, inp) for svd in found)
        spectrum = Spectrum(tuple(squares.tolist()), total, cost, whole)
        gap = max((svd.gap for svd in found), default=0.0)
        how = "exact" if gap == 0 else "certified" if self._certify else "estimate"
        return Factored(kind, tuple(D.shape), (E, out, inp), known, at, spectrum, gap, how)

    def _generator(self, name: str, like: Tensor) -> torch.Generator:
        """From the seed and the name alone, so that neither order nor selection shows."""
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:7], "little")
        return torch.Generator(like.device).manual_seed(seed)

    def triplets(self, factored: Factored, rank: int) -> tuple[Tensor, Tensor]:
        """(A (rank, E, in), B (rank, E, out)) in float32."""
        E, out, inp = factored.sizes
        A, B = torch.empty(rank, E, inp, dtype=torch.float32), torch.empty(rank, E, out, dtype=torch.float32)
        for side, at in ((A, factored.at), (B, factored.at + 4 * factored.known * E * inp)):
            read_into(self._file, side.view(torch.uint8).numpy().data.cast("B"), at)
        return A, B

    def tensors(self, factored: Factored, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B as the adapter holds them."""
        A, B = KINDS[factored.kind].lay(*self.triplets(factored, rank), factored.shape)
        return A.to(dtype).contiguous(), B.to(dtype).contiguous()

    def stored(self, factored: Factored, rank: int, dtype: torch.dtype) -> float:
        """||B A - B' A'|| / ||B A||, what rounding the factors to `dtype` adds."""
        if dtype == torch.float32 or not rank:
            return 0.0
        A, B = (side.double() for side in self.triplets(factored, rank))
        small_A, small_B = A.to(dtype).double(), B.to(dtype).double()
        # from the cores of [B, -B'] and [A; A'] of each matrix of the stack
        left = torch.cat([B, -small_B]).permute(1, 2, 0)  # (E, out, 2r)
        right = torch.cat([A, small_A]).permute(1, 2, 0)  # (E, in, 2r)
        R = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right, mode="r").R.mT
        energy = math.fsum(factored.spectrum.squares[:rank])
        return float(torch.linalg.vector_norm(R)) / math.sqrt(energy) if energy else 0.0

    def effective_rank(self, factored: Factored, rank: int) -> float:
        """exp of the entropy of the kept singular values (of a stack: of their root mean squares)."""
        return float(effective_rank(torch.tensor(factored.spectrum.squares[:rank], dtype=torch.float64).sqrt()))


def noise_edge(variance: float, sizes: tuple[int, int, int]) -> float:
    """The largest singular value of noise alone: sigma (sqrt(m) + sqrt(n)), the edge of Marchenko and Pastur (1967)."""
    return math.sqrt(variance) * (math.sqrt(sizes[1]) + math.sqrt(sizes[2]))
