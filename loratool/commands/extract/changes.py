"""Sort the changes of a fine-tune into deltas to factor, tensors to keep exactly, and tensors to exclude.

The role of a tensor, known from headers, decides where it goes. Whether it changed is found by reading it, which ranks
share. The one matrix of a tied model is several modules, as an embedding and a head, so its delta is for each module
that the model calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...architectures.beside_layers import EMBEDDINGS, MTP
from ...architectures.prefixes import module_path
from ...architectures.ties import PAST_ITS_MODULE
from ...binding.modules.selection import Selection
from ...binding.names.class_names import ClassNames
from ...binding.names.peft_names import is_bypassed, looks_up_otherwise
from ...binding.ties.shared_tensors import find_shared
from ...binding.ties.ties import find_tie
from ...binding.weights.candidates import select_weight
from ...binding.weights.default_targets import find_unnamed, kept_whole
from ...binding.weights.model_pairs import ModelPairs
from ...binding.weights.model_weights import ModelWeight, rearranged_weights, weight_of_tensor
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import FLOATS
from ...files.tensor_compare import difference, same_values
from ...files.tensor_ref import TensorRef
from ...numerics.arrays import ON_CPU, dot, doubled


@dataclass(frozen=True)
class WeightDelta:
    """A weight with a delta to factor."""

    weight: ModelWeight
    sides: Mapping[str, tuple[TensorRef, TensorRef]]  # the base's name -> the tensor of base and tuned model
    uses: tuple[tuple[str, bool], ...] = ()  # as in `Tie.uses`, where the model ties it

    @property
    def cost(self) -> int:
        """The parameters that one rank takes in all modules that get the factors."""
        return self.weight.parameters_per_rank * (len(self.uses) or 1)

    @property
    def matrices(self) -> list[tuple[list[TensorRef], list[TensorRef]]]:
        """Return for each matrix the tensors of base and tuned model that are concatenated in it."""
        both = (self.weight.matrices(lambda name, side=side: self.sides[name][side]) for side in (0, 1))  # type: ignore[misc]
        return list(zip(*both, strict=True))

    @property
    def is_precise(self) -> bool:
        """Return whether both sides have 32 bits or more everywhere, so that rounding is negligible."""
        sides = [ref for matrix in self.matrices for side in matrix for ref in side]
        return all(not ref.weight and ref.spec.dtype in ("F32", "F64") for ref in sides)


@dataclass
class SortedDeltas:
    """All differences between the two models, and where each goes."""

    in_model: ClassNames | None = None  # as in `plan_sorting`
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

    def exact_cost(self, in_bytes: bool) -> int:
        """Return the size of the exact tensors and of the alphas, in bytes or in parameters."""
        alphas = len(self.low_rank) * (4 if in_bytes else 1) if self.alphas else 0
        return alphas + sum(source.spec.nbytes if in_bytes else source.spec.size for source in self.exact.values())


@dataclass(frozen=True)
class SidePair:
    """A tensor of the base and that of the tuned model, to be compared."""

    name: str
    base: TensorRef
    tuned: TensorRef
    measured: bool = False  # how far they are apart is asked, if they are not equal


@dataclass(frozen=True)
class Compared:
    """The result of comparing a pair."""

    equal: bool
    norms: tuple[float, float] | None = None  # ||W||^2 and ||D||^2, if they are measured


def compare_sides(pair: SidePair) -> Compared:
    """Read a pair, and compare it.

    Raises:
        InputError: it is measured, and one has nan or inf.
    """
    base, tuned = pair.base, pair.tuned
    if _are_numbers(base, tuned):
        equal = _is_unchanged(base, tuned)
    else:
        equal = base.spec == tuned.spec and base.file.read(base.name) == tuned.file.read(tuned.name)
    if equal or not pair.measured:
        return Compared(equal)
    between = difference(base, tuned, ON_CPU)
    D = doubled(between.D)
    return Compared(False, (between.base_squared, dot(D, D)))


def plan_sorting(
    base: Checkpoint,
    pairs: ModelPairs,
    selection: Selection,
    embed: str,
    bias: bool,
    in_model: ClassNames | None = None,
) -> Sorting:
    """Plan the comparisons of two models, and where each tensor goes if it differs.

    Args:
        embed: a key of EMBED_CHOICES.
        bias: keep changed biases and norms.
        in_model: maps a tensor's name to that in the model that PEFT wraps; None for other formats than PEFT.

    Raises:
        InputError: the shapes of a tensor differ otherwise than by the size of a vocabulary.
    """
    tie = find_tie(base)
    both, taken = dict(pairs.both), set[str]()
    for name in tie.lacking(base) if tie else ():
        if tie and name in pairs.only_tuned:
            both[name] = (base.ref(tie.stored_as(name)), pairs.only_tuned[name])
            taken.add(name)
    shared = find_shared(base) | ({tie.embedding: tie.uses({*base.specs, *taken})} if tie else {})
    aliases = {tie.bias[1]: tie.bias[0]} if tie and tie.bias else {}
    sorting = Sorting(base, selection, embed, bias, in_model, shared, aliases, taken)
    rearranged = rearranged_weights(base, in_model) if in_model else {}
    for weight in {weight.name: weight for each in rearranged.values() for weight in each}.values():
        sorting.plan_rearranged(WeightDelta(weight, both))
    for name, (base_ref, tuned_ref) in both.items():
        if name not in rearranged:
            sorting.plan_tensor(name, base_ref, tuned_ref)
    return sorting


VOCABULARY = frozenset({"embedding", "head"})  # roles whose rows are tokens


@dataclass(frozen=True)
class _Case:
    """A tensor, or the tensors of a weight, and where they go if they changed."""

    place: str  # factors, vocabulary, exact or out
    pairs: tuple[SidePair, ...]
    delta: WeightDelta | None = None  # if the place is factors
    grown: TensorRef | None = None  # the tuned model's tensor, which has other rows than the base's: there is no pair


class Sorting:
    """The plan of the comparisons of two models, and their consequences.

    Attributes:
        pairs: the tensors to compare.
        deltas: the weights to factor if they changed.
    """

    def __init__(
        self,
        base: Checkpoint,
        selection: Selection,
        embed: str,
        bias: bool,
        in_model: ClassNames | None,
        shared: Mapping[str, tuple[tuple[str, bool], ...]],
        aliases: Mapping[str, str],
        taken: set[str],
    ) -> None:
        """Take the arguments of `plan_sorting`.

        Args:
            shared: tensor -> the modules that have it, as in `Tie.uses`.
            aliases: a tensor -> its name in the files.
            taken: as in `SortedDeltas`.
        """
        self._base, self._selection, self._embed, self._bias, self._in_model = base, selection, embed, bias, in_model
        self._aliases, self._taken, self._cases = aliases, taken, list[tuple[str, _Case]]()
        self.pairs, self.deltas = list[SidePair](), list[WeightDelta]()
        self._unnamed = find_unnamed(base, in_model, selection.target) if in_model else {}
        self._routers = kept_whole(base, in_model, self._unnamed) if in_model else {}
        self._uses = {  # a bare class has no head
            name: tuple(use for use in uses if self._path(use[0])) for name, uses in shared.items()
        }

    def _path(self, name: str) -> str:
        """Return a tensor's name in the class, or in the files for other formats than PEFT."""
        return self._in_model(name) if self._in_model else name

    def _plan(self, name: str, case: _Case) -> None:
        self._cases.append((name, case))
        self.pairs += case.pairs
        if case.delta:
            self.deltas.append(case.delta)

    def plan_tensor(self, name: str, base: TensorRef, tuned: TensorRef) -> None:
        """Plan one tensor of both sides.

        Raises:
            InputError: the shapes differ otherwise than by the size of a vocabulary.
        """
        if not _are_numbers(base, tuned):
            self._plan(name, _Case("out", (SidePair(name, base, tuned),)))
            return
        weight = weight_of_tensor(self._base, name, base.spec, self._in_model)
        grown = base.spec.shape != tuned.spec.shape
        if grown and self._path(name):
            resized = weight and weight.role in VOCABULARY and base.spec.shape[1:] == tuned.spec.shape[1:]
            if not resized:
                raise _other_shape(name, base, tuned)
        place = self._place(name, weight, base, grown)
        if place == "factors" and weight:
            delta = WeightDelta(weight, {name: (base, tuned)}, self._uses.get(name, ()))
            self._plan(name, _Case(place, (SidePair(name, base, tuned),), delta))
        elif grown:
            self._plan(name, _Case(place, (), grown=tuned))
        else:
            self._plan(name, _Case(place, (SidePair(name, base, tuned, measured=True),)))

    def plan_rearranged(self, delta: WeightDelta) -> None:
        """Plan a weight that is several tensors in the files, or some rows of one.

        Raises:
            InputError: the shapes of a tensor differ.
        """
        weight = delta.weight
        sides = {name: delta.sides[name] for name in weight.names if name in delta.sides}
        for name, (base, tuned) in sides.items():
            if base.spec.shape != tuned.spec.shape:
                raise _other_shape(name, base, tuned)
        complete = len(sides) == len(weight.names)
        if complete and len(sides) == len(weight.pieces) == 1:  # some rows of it, by the name in the class
            ((ones, twos),) = delta.matrices
            sides = {weight.name: (ones[0], twos[0])}
        selected = complete and weight.names[0] not in self._unnamed and select_weight(self._selection, weight)
        if selected and weight.role:
            pairs = tuple(SidePair(name, *pair) for name, pair in sides.items())
            self._plan(weight.name, _Case("factors", pairs, delta))
            return
        for name, (base, tuned) in sides.items():
            is_exact = selected and self._bias and weight.in_model.endswith(".bias") and name == weight.name
            measured = {base.spec.dtype, tuned.spec.dtype} <= set(FLOATS)
            self._plan(name, _Case("bias" if is_exact else "out", (SidePair(name, base, tuned, measured),)))

    def sort(self, compared: Sequence[Compared]) -> SortedDeltas:
        """Return the differences and where they go. `compared` has a result of `compare_sides` per pair."""
        deltas, results = SortedDeltas(self._in_model, taken=self._taken), iter(compared)
        for name, case in self._cases:
            changed = bool(case.grown)
            for pair, result in zip(case.pairs, results, strict=False):
                changed = changed or not result.equal
                deltas.unchanged += result.equal
                if result.norms:
                    deltas.norms[name] = result.norms
                    deltas.matrices |= {name} if len(pair.base.spec.shape) > 1 else set()
            if changed:
                self._put(deltas, name, case)
        deltas.saved = {path for path in deltas.saved if not any(path.startswith(f"{each}.") for each in deltas.saved)}
        for alias, stored in self._aliases.items():
            if alias in deltas.exact and stored in deltas.exact:
                deltas.exact[alias] = deltas.exact[stored]
        return deltas

    def _put(self, deltas: SortedDeltas, name: str, case: _Case) -> None:
        if case.delta:
            deltas.low_rank[name] = case.delta
            return
        tuned = case.grown or case.pairs[0].tuned
        if case.place == "vocabulary":
            self._keep_vocabulary(deltas, name, tuned)
        elif case.place == "exact":
            self._keep_exactly(deltas, name, tuned)
        elif case.place == "bias":
            deltas.exact[name], deltas.biased = tuned, True
        else:
            deltas.left_out[name] = math.sqrt(deltas.norms[name][1]) if name in deltas.norms else None

    def _place(self, name: str, weight: ModelWeight | None, base: TensorRef, grown: bool) -> str:
        """Return where a changed tensor goes: factors, vocabulary, exact or out."""
        path, group = self._path(name), self._unnamed.get(name, "")
        uses = [self._path(use) for use, _ in self._uses.get(name, ())]
        selected = self._selection.selects(*{*map(module_path, (name, path, *uses))})
        if not path or not selected or group in (MTP, EMBEDDINGS):
            return "out"
        if weight and self._in_model and is_bypassed(self._in_model.family, weight.in_model):
            return "out"
        role = weight.role if weight and not group else ""
        if weight and role in VOCABULARY:
            if grown or self._embed == "full" or (self._embed == "lora" and self._is_used_otherwise(name, weight)):
                return "vocabulary"
            return "factors" if self._embed == "lora" else "out"
        if role:
            return "factors"
        return "exact" if self._bias and (name in self._routers or _is_bias_or_norm(name, base)) else "out"

    def _is_used_otherwise(self, name: str, weight: ModelWeight) -> bool:
        """Return whether factors of an embedding or a head would change something that the tuned model did not."""
        past = bool(PAST_ITS_MODULE.intersection(self._base.model_types))
        if past and any(transposed for _, transposed in self._uses.get(name, ())):
            return True
        return self._in_model is not None and looks_up_otherwise(self._base, weight.in_model)

    def _names_used(self, name: str) -> list[str]:
        """Return the names that a tensor must have in the adapter."""
        return [use for use, _ in self._uses.get(name, ())] or [name]

    def _keep_vocabulary(self, deltas: SortedDeltas, name: str, tuned: TensorRef) -> None:
        """Keep an embedding or a head exactly, with its bias or norm: PEFT expects all tensors of a saved module."""
        base, exact = self._base, deltas.exact
        for use in self._names_used(name):
            module = module_path(use)
            exact[use] = tuned
            path = self._path(module)
            deltas.saved.add(path)
            for other in base.specs:
                if self._path(other).startswith(f"{path}."):
                    exact.setdefault(other, base.ref(other))
            stored = self._aliases.get(f"{module}.bias", f"{module}.bias")
            if stored in base.specs:
                exact.setdefault(f"{module}.bias", base.ref(stored))

    def _keep_exactly(self, deltas: SortedDeltas, name: str, tuned: TensorRef) -> None:
        """Keep a bias by itself, or the full module of a norm or router, even if parts of it did not change."""
        uses = self._names_used(name)
        deltas.exact.update(dict.fromkeys(uses, tuned))
        if name in self._routers:
            module = self._routers[name]
            members = module.tensors
            deltas.saved.add(module.path)
        elif name.endswith(".bias"):
            deltas.biased = True
            return
        else:
            deltas.saved.update(self._path(use.removesuffix(".weight")) for use in uses)
            members = tuple(n for n in (f"{name.removesuffix('.weight')}.bias",) if n in self._base.specs)
        for member in members:
            for use in self._names_used(member):
                deltas.exact.setdefault(use, self._base.ref(member))


def _other_shape(name: str, base: TensorRef, tuned: TensorRef) -> InputError:
    return InputError(f"is {base.spec.shape} in the base and {tuned.spec.shape} in the tuned model", culprit=name)


def _are_numbers(base: TensorRef, tuned: TensorRef) -> bool:
    return base.spec.dtype in FLOATS and tuned.spec.dtype in FLOATS and bool(base.spec.size and base.spec.shape)


def _is_unchanged(base: TensorRef, tuned: TensorRef) -> bool:
    """Return whether both have the same numbers. If one is coded, they are compared in the type of the other."""
    if (base.weight is None) != (tuned.weight is None):
        coded, plain = (base, tuned) if base.weight else (tuned, base)
        return same_values(coded, plain)
    return same_values(base, tuned) and (base.spec == tuned.spec or same_values(tuned, base))


def _is_bias_or_norm(name: str, base: TensorRef) -> bool:
    return len(base.spec.shape) == 1 and name.endswith((".bias", ".weight"))
