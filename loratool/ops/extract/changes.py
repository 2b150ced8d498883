"""What of a fine-tune goes where in an adapter: which change is factored, which is kept whole, which is left out.

A change is sorted by what its tensor is for; a tied model's one matrix is an embedding and a head at once, and so
changes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...adapters.weight_kinds import weight_kind
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...binding.model_pairs import ModelPairs
from ...binding.peft_names import bare_routers, role_in_model
from ...binding.selection import Selection
from ...binding.tied_weights import find_tie
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TORCH_FLOATS
from ...files.tensor_compare import difference, same_values
from ...files.tensor_ref import TensorRef


@dataclass(frozen=True)
class WeightDelta:
    """A weight whose change is factored. also: the name of the head that is the same matrix, where the model ties
    them.
    """

    name: str
    kind: str
    base: TensorRef
    tuned: TensorRef
    also: str | None = None

    @property
    def cost(self) -> int:
        """Parameters a rank, counted twice where the factors are."""
        shape = self.base.spec.shape
        count = shape[0] * (shape[1] + shape[2]) if self.kind.startswith("experts") else shape[0] + math.prod(shape[1:])
        return count * (2 if self.also else 1)


@dataclass
class SortedDeltas:
    """All changes. low_rank: by the base's name; exact: name in the adapter -> the tuned tensor; norms: of what is not
    factored, (||W||^2, ||D||^2), and matrices those with more than one dimension; taken: tensors of the tuned side
    alone that found a use; alphas: whether the adapter has a float32 for each module; in_model: as in `sort_changes`;
    routers: tensors of modules that PEFT takes whole or not at all -> all tensors of that module; aliases: a tensor ->
    the name under which the files have it.
    """

    low_rank: dict[str, WeightDelta] = field(default_factory=dict)
    exact: dict[str, TensorRef] = field(default_factory=dict)
    left_out: dict[str, float | None] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    matrices: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)
    biased: bool = False
    unchanged: int = 0
    taken: set[str] = field(default_factory=set)
    alphas: bool = False
    in_model: Callable[[str], str] | None = None
    routers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def exact_cost(self, in_bytes: bool) -> int:
        """Of what is kept exactly, and of the alphas: bytes, or parameters."""
        alphas = len(self.low_rank) * (4 if in_bytes else 1) if self.alphas else 0
        return alphas + sum(source.spec.nbytes if in_bytes else source.spec.size for source in self.exact.values())


def sort_deltas(
    base: Checkpoint,
    pairs: ModelPairs,
    selection: Selection,
    embed: str,
    bias: bool,
    in_model: Callable[[str], str] | None = None,
) -> SortedDeltas:
    """embed: a key of EMBED; bias: keep biases and norms; in_model: names in the model, where PEFT is to wrap it.

    Raises InputError for shapes that differ beside vocabularies.
    """
    found = SortedDeltas(in_model=in_model, routers=bare_routers(base, in_model) if in_model else {})
    tie = find_tie(base)
    both = dict(pairs.both)
    lacking = tie.lacking(base) if tie else {}
    apart = [name for name in pairs.only_tuned if name in lacking]
    for name in apart:
        assert tie is not None
        first = tie.stored_as(name)
        both[name] = (TensorRef(base.shard_of[first], first), pairs.only_tuned[name])
        found.taken.add(name)
    if tie and tie.bias:
        found.aliases = {tie.bias[1]: tie.bias[0]}
    for name, (one, two) in both.items():
        also = tie.head if tie and name == tie.embedding and not tie.is_stored(base) and tie.head not in apart else None
        _sort(base, name, one, two, also, selection, embed, bias, found)
    for alias, stored in found.aliases.items():
        if alias in found.exact and stored in found.exact:
            found.exact[alias] = found.exact[stored]
    return found


def _sort(
    base: Checkpoint,
    name: str,
    one: TensorRef,
    two: TensorRef,
    also: str | None,
    selection: Selection,
    embed: str,
    bias: bool,
    found: SortedDeltas,
) -> None:
    """One tensor of both sides to its place."""
    floats = one.spec.dtype in TORCH_FLOATS and two.spec.dtype in TORCH_FLOATS
    if not floats or not one.spec.size or not one.spec.shape:
        if one.spec == two.spec and one.file.read(one.name) == two.file.read(two.name):
            found.unchanged += 1
        else:
            found.left_out[name] = None
        return
    module = module_path(name)
    what = weight_role(module, len(one.spec.shape), True)
    if found.in_model:
        what = role_in_model(base, name, found.in_model(name), one.spec)
    grown = one.spec.shape != two.spec.shape
    if grown and (what not in ("embedding", "head") or one.spec.shape[1:] != two.spec.shape[1:]):
        raise InputError(f"is {one.spec.shape} in the base and {two.spec.shape} in the tuned model", culprit=name)
    if not grown and same_values(one, two) and (one.spec == two.spec or same_values(two, one)):
        found.unchanged += 1
        return
    selected = selection.selects(module)
    vocabulary = what in ("embedding", "head")
    if selected and vocabulary and (grown or embed == "full"):
        _keep_whole(base, found, name, two, also)
        if not grown:
            _measure(found, name, one, two)
    elif selected and what and not (vocabulary and embed == "skip"):
        found.low_rank[name] = WeightDelta(name, weight_kind(base.model_types, module, what), one, two, also)
    elif selected and bias and (name in found.routers or _is_bias_or_norm(name, one)):
        _measure(found, name, one, two)
        _keep(base, found, name, two)
    else:
        if not grown:
            _measure(found, name, one, two)
        found.left_out[name] = math.sqrt(found.norms[name][1]) if name in found.norms else None


def _is_bias_or_norm(name: str, one: TensorRef) -> bool:
    return len(one.spec.shape) == 1 and name.endswith((".bias", ".weight"))


def _measure(found: SortedDeltas, name: str, one: TensorRef, two: TensorRef) -> None:
    between = difference(one, two, torch.device("cpu"))
    if len(one.spec.shape) > 1:
        found.matrices.add(name)
    found.norms[name] = (between.base_squared, float(between.D.double().square().sum()))


def _keep_whole(base: Checkpoint, found: SortedDeltas, name: str, two: TensorRef, also: str | None) -> None:
    """With its bias, which PEFT misses where a module that it saves has one."""
    for each in (name, also):
        if each:
            module = module_path(each)
            found.exact[each] = two
            found.saved.add(found.in_model(module) if found.in_model else module)
            stored = found.aliases.get(f"{module}.bias", f"{module}.bias")
            if stored in base.specs:
                found.exact.setdefault(f"{module}.bias", TensorRef(base.shard_of[stored], stored))


def _keep(base: Checkpoint, found: SortedDeltas, name: str, two: TensorRef) -> None:
    """A norm's or router's module whole, with what in it may not have changed; a bias by itself."""
    found.exact[name] = two
    if name in found.routers:
        assert found.in_model
        members = found.routers[name]
        found.saved.add(found.in_model(name).rpartition(".")[0])
    elif name.endswith(".bias"):
        found.biased = True
        return
    else:
        module = name.removesuffix(".weight")
        found.saved.add(found.in_model(module) if found.in_model else module)
        members = tuple(n for n in (f"{module}.bias",) if n in base.specs)
    for each in members:
        found.exact.setdefault(each, TensorRef(base.shard_of[each], each))
