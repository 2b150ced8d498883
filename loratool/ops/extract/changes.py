"""Sort what a fine-tune changed into deltas to factor, tensors to keep exactly, and tensors to leave out.

A tensor goes where its role says. The one matrix of a tied model is several modules at once, an embedding and a head
for one, so its delta is for each that the model calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...architectures.beside_layers import EMBEDDINGS, MTP
from ...architectures.prefixes import module_path
from ...architectures.ties import PAST_ITS_MODULE
from ...binding.candidates import select_weight
from ...binding.class_names import ClassNames
from ...binding.default_targets import find_unnamed, kept_whole
from ...binding.model_pairs import ModelPairs
from ...binding.model_weights import ModelWeight, rearranged_weights, weight_of_tensor
from ...binding.peft_names import is_bypassed, looks_up_otherwise
from ...binding.selection import Selection
from ...binding.shared_tensors import find_shared
from ...binding.tied_weights import find_tie
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import FLOATS
from ...files.tensor_compare import difference, same_values
from ...files.tensor_ref import TensorRef


@dataclass(frozen=True)
class WeightDelta:
    """A weight whose delta is factored."""

    weight: ModelWeight
    sides: Mapping[str, tuple[TensorRef, TensorRef]]  # the base's name -> the tensor of base and tuned model
    uses: tuple[tuple[str, bool], ...] = ()  # as in `Tie.uses`, where the model ties it

    @property
    def cost(self) -> int:
        """The parameters that one rank takes in all modules that get the factors."""
        return self.weight.parameters_per_rank * (len(self.uses) or 1)

    @property
    def matrices(self) -> list[tuple[list[TensorRef], list[TensorRef]]]:
        """Return of each matrix the tensors of base and tuned model that are below one another in it."""
        both = (self.weight.matrices(lambda name, side=side: self.sides[name][side]) for side in (0, 1))  # type: ignore[misc]
        return list(zip(*both, strict=True))


@dataclass
class SortedDeltas:
    """Everything that differs between the two models, and where it goes."""

    low_rank: dict[str, WeightDelta] = field(default_factory=dict)  # by the base's name
    exact: dict[str, TensorRef] = field(default_factory=dict)  # the base's name -> the tensor to store
    left_out: dict[str, float | None] = field(default_factory=dict)  # name -> ||D||, None if it cannot be told
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (||W||^2, ||D||^2), if not factored
    matrices: set[str] = field(default_factory=set)  # the names in `norms` that have more than one dimension
    saved: set[str] = field(default_factory=set)  # modules_to_save
    biased: bool = False  # a bias is in `exact`
    unchanged: int = 0  # how many tensors are equal
    taken: set[str] = field(default_factory=set)  # tensors of the tuned side alone that found a use
    alphas: bool = False  # the format stores a float32 alpha for each module
    in_model: ClassNames | None = None  # as in `sort_deltas`
    routers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a tensor -> all of its module, saved as one
    uses: Mapping[str, tuple[tuple[str, bool], ...]] = field(default_factory=dict)  # of tensors that modules share
    unnamed: Mapping[str, str] = field(default_factory=dict)  # of `default_targets.find_unnamed`
    aliases: Mapping[str, str] = field(default_factory=dict)  # a tensor -> its name in the files

    def exact_cost(self, in_bytes: bool) -> int:
        """Return the size of the exact tensors and of the alphas, in bytes or in parameters."""
        alphas = len(self.low_rank) * (4 if in_bytes else 1) if self.alphas else 0
        return alphas + sum(source.spec.nbytes if in_bytes else source.spec.size for source in self.exact.values())


def sort_deltas(
    base: Checkpoint,
    pairs: ModelPairs,
    selection: Selection,
    embed: str,
    bias: bool,
    in_model: ClassNames | None = None,
) -> SortedDeltas:
    """Compare two models tensor by tensor, and sort what differs.

    Args:
        embed: a key of EMBED_CHOICES.
        bias: keep changed biases and norms.
        in_model: maps a tensor's name to the one in the model that PEFT wraps; None for an adapter that is not PEFT's.

    Raises:
        InputError: the shapes of a tensor differ otherwise than by the size of a vocabulary.
    """
    found = SortedDeltas(in_model=in_model)
    if in_model:
        found.unnamed = find_unnamed(base, in_model, selection.target)
        found.routers = kept_whole(base, in_model, found.unnamed)
    tie = find_tie(base)
    both = dict(pairs.both)
    missing = tie.lacking(base) if tie else {}
    untied = [name for name in pairs.only_tuned if name in missing]
    for name in untied:
        assert tie is not None
        first = tie.stored_as(name)
        both[name] = (base.ref(first), pairs.only_tuned[name])
        found.taken.add(name)
    if tie and tie.bias:
        found.aliases = {tie.bias[1]: tie.bias[0]}
    shared = find_shared(base) | ({tie.embedding: tie.uses({*base.specs, *untied})} if tie else {})
    found.uses = {  # a bare class has no head
        name: tuple(use for use in uses if in_model is None or in_model(use[0])) for name, uses in shared.items()
    }
    rearranged = rearranged_weights(base, in_model) if in_model else {}
    for weight in {weight.name: weight for each in rearranged.values() for weight in each}.values():
        _sort_rearranged(WeightDelta(weight, both), selection, bias, found)
    for name, (one, two) in both.items():
        if name not in rearranged:
            _sort_tensor(base, name, one, two, selection, embed, bias, found)
    found.saved = {path for path in found.saved if not any(path.startswith(f"{owner}.") for owner in found.saved)}
    for alias, stored in found.aliases.items():
        if alias in found.exact and stored in found.exact:
            found.exact[alias] = found.exact[stored]
    return found


def _sort_tensor(
    base: Checkpoint,
    name: str,
    one: TensorRef,
    two: TensorRef,
    selection: Selection,
    embed: str,
    bias: bool,
    found: SortedDeltas,
) -> None:
    """Put one tensor of both sides where its role says."""
    floats = one.spec.dtype in FLOATS and two.spec.dtype in FLOATS
    if not floats or not one.spec.size or not one.spec.shape:
        if one.spec == two.spec and one.file.read(one.name) == two.file.read(two.name):
            found.unchanged += 1
        else:
            found.left_out[name] = None
        return
    module, weight = module_path(name), weight_of_tensor(base, name, one.spec, found.in_model)
    role = weight.role if weight else ""
    grown = one.spec.shape != two.spec.shape
    absent = found.in_model is not None and not found.in_model(name)
    if grown and not absent and (role not in ("embedding", "head") or one.spec.shape[1:] != two.spec.shape[1:]):
        raise InputError(f"is {one.spec.shape} in the base and {two.spec.shape} in the tuned model", culprit=name)
    if not grown and _is_unchanged(one, two):
        found.unchanged += 1
        return
    group = found.unnamed.get(name, "")
    paths = (module, module_path(found.in_model(name))) if found.in_model else (module,)
    selected = selection.selects(*paths) and not absent
    bypassed = weight and found.in_model and is_bypassed(found.in_model.family, weight.in_model)
    selected = selected and group not in (MTP, EMBEDDINGS) and not bypassed
    role = "" if group else role
    vocabulary = role in ("embedding", "head")
    other = weight and found.in_model and looks_up_otherwise(base, weight.in_model)
    if PAST_ITS_MODULE.intersection(base.model_types):
        other = other or any(transposed for _, transposed in found.uses.get(name, ()))
    keep = grown or embed == "full" or (embed == "lora" and other)
    if selected and vocabulary and keep:
        _keep_vocabulary(base, found, name, two)
        if not grown:
            _measure(found, name, one, two)
    elif selected and weight and role and not (vocabulary and embed == "skip"):
        found.low_rank[name] = WeightDelta(weight, {name: (one, two)}, found.uses.get(name, ()))
    elif selected and bias and (name in found.routers or _is_bias_or_norm(name, one)):
        _measure(found, name, one, two)
        _keep_exactly(base, found, name, two)
    else:
        if not grown:
            _measure(found, name, one, two)
        found.left_out[name] = math.sqrt(found.norms[name][1]) if name in found.norms else None


def _sort_rearranged(delta: WeightDelta, selection: Selection, bias: bool, found: SortedDeltas) -> None:
    """Put a weight that is several tensors of the files, or some rows of one."""
    weight = delta.weight
    sides = {name: delta.sides[name] for name in weight.names if name in delta.sides}
    for name, (one, two) in sides.items():
        if one.spec.shape != two.spec.shape:
            raise InputError(f"is {one.spec.shape} in the base and {two.spec.shape} in the tuned model", culprit=name)
    complete = len(sides) == len(weight.names)
    if complete and len(sides) == 1:  # some rows of it, by the name in the class
        ((ones, twos),) = delta.matrices
        sides = {weight.name: (ones[0], twos[0])}
    changed = {name: pair for name, pair in sides.items() if not _is_unchanged(*pair)}
    found.unchanged += len(sides) - len(changed)
    is_selected = complete and weight.names[0] not in found.unnamed and select_weight(selection, weight)
    if changed and is_selected and weight.role:
        found.low_rank[weight.name] = delta
        return
    for name, (one, two) in changed.items():
        if {one.spec.dtype, two.spec.dtype} <= set(FLOATS):
            _measure(found, name, one, two)
        if is_selected and bias and weight.in_model.endswith(".bias") and name == weight.name:
            found.exact[name], found.biased = two, True
        else:
            found.left_out[name] = math.sqrt(found.norms[name][1]) if name in found.norms else None


def _is_unchanged(one: TensorRef, two: TensorRef) -> bool:
    """Return whether both have the same numbers, where one alone is coded as far as the other's type holds them."""
    if (one.weight is None) != (two.weight is None):
        coded, plain = (one, two) if one.weight else (two, one)
        return same_values(coded, plain)
    return same_values(one, two) and (one.spec == two.spec or same_values(two, one))


def _is_bias_or_norm(name: str, one: TensorRef) -> bool:
    return len(one.spec.shape) == 1 and name.endswith((".bias", ".weight"))


def _measure(found: SortedDeltas, name: str, one: TensorRef, two: TensorRef) -> None:
    """Record ||W||^2 and ||D||^2 of a tensor that is not factored."""
    between = difference(one, two, torch.device("cpu"))
    if len(one.spec.shape) > 1:
        found.matrices.add(name)
    found.norms[name] = (between.base_squared, float(between.D.double().square().sum()))


def _names_used(found: SortedDeltas, name: str) -> list[str]:
    """Return the names under which a tensor has to be in the adapter."""
    return [use for use, _ in found.uses.get(name, ())] or [name]


def _keep_vocabulary(base: Checkpoint, found: SortedDeltas, name: str, two: TensorRef) -> None:
    """Keep an embedding or a head exactly, with its bias or norm: PEFT expects all of a module that it saves."""
    for use in _names_used(found, name):
        module = module_path(use)
        found.exact[use] = two
        path = found.in_model(module) if found.in_model else module
        found.saved.add(path)
        for other in base.specs:
            if (found.in_model(other) if found.in_model else other).startswith(f"{path}."):
                found.exact.setdefault(other, base.ref(other))
        stored = found.aliases.get(f"{module}.bias", f"{module}.bias")
        if stored in base.specs:
            found.exact.setdefault(f"{module}.bias", base.ref(stored))


def _keep_exactly(base: Checkpoint, found: SortedDeltas, name: str, two: TensorRef) -> None:
    """Keep a bias by itself, or all of a norm's or router's module, though some of it may not have changed."""
    uses = _names_used(found, name)
    found.exact.update(dict.fromkeys(uses, two))
    if name in found.routers:
        assert found.in_model
        members = found.routers[name]
        found.saved.update(found.in_model(use).rpartition(".")[0] for use in uses)
    elif name.endswith(".bias"):
        found.biased = True
        return
    else:
        modules = [use.removesuffix(".weight") for use in uses]
        found.saved.update(found.in_model(module) if found.in_model else module for module in modules)
        members = tuple(n for n in (f"{name.removesuffix('.weight')}.bias",) if n in base.specs)
    for each in members:
        for use in _names_used(found, each):
            found.exact.setdefault(use, base.ref(each))
