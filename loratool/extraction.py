"""What of a fine-tune goes where in an adapter: which change is factored, which is kept whole, which is left out.

A change is sorted by what its tensor is for; a tied model's one matrix is an embedding and a head at once, and so
changes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .architectures.conv1d import stores_transposed
from .architectures.roles import role
from .architectures.wrappers import module_of
from .checkpoint import Checkpoint
from .errors import InputError
from .factoring import KINDS, Factored, FactorSpool, factor_shapes, kind_of, lay_out
from .formats.peft_write import SAFETENSORS, lora_config
from .pairing import Pairs, difference
from .source import Source, equal_rows
from .targets import Selection
from .tensorfile import TORCH_FLOATS, TensorSpec
from .tied import find_tie
from .wrapping import is_bare_router, role_in_model


@dataclass(frozen=True)
class Change:
    """A weight whose change is factored. also: the name of the head that is the same matrix, where the model ties
    them.
    """

    name: str
    kind: str
    base: Source
    tuned: Source
    also: str | None = None

    @property
    def cost(self) -> int:
        """Parameters a rank, counted twice where the factors are."""
        shape = self.base.spec.shape
        count = shape[0] * (shape[1] + shape[2]) if self.kind.startswith("experts") else shape[0] + math.prod(shape[1:])
        return count * (2 if self.also else 1)


@dataclass
class Sorted:
    """All changes. low_rank: by the base's name; exact: name in the adapter -> the tuned tensor; norms: of what is not
    factored, (||W||^2, ||D||^2), and matrices those with more than one dimension; taken: tensors of the tuned side
    alone that found a use; alphas: whether the adapter has a float32 for each module; in_model: as in `sort_changes`.
    """

    low_rank: dict[str, Change] = field(default_factory=dict)
    exact: dict[str, Source] = field(default_factory=dict)
    left_out: dict[str, float | None] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    matrices: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)
    biased: bool = False
    unchanged: int = 0
    taken: set[str] = field(default_factory=set)
    alphas: bool = False
    in_model: Callable[[str], str] | None = None

    def exact_cost(self, in_bytes: bool) -> int:
        """Of what is kept exactly, and of the alphas: bytes, or parameters."""
        alphas = len(self.low_rank) * (4 if in_bytes else 1) if self.alphas else 0
        return alphas + sum(source.spec.nbytes if in_bytes else source.spec.size for source in self.exact.values())


def sort_changes(
    base: Checkpoint,
    pairs: Pairs,
    selection: Selection,
    embed: str,
    bias: bool,
    in_model: Callable[[str], str] | None = None,
) -> Sorted:
    """embed: a key of EMBED; bias: keep biases and norms; in_model: names in the model, where PEFT is to wrap it.

    Raises InputError for shapes that differ beside vocabularies.
    """
    found = Sorted(in_model=in_model)
    tie = find_tie(base)
    both = dict(pairs.both)
    lacking = tie.lacking(base) if tie else {}
    apart = [name for name in pairs.only_tuned if name in lacking]
    for name in apart:
        assert tie is not None
        first = tie.stored_as(name)
        both[name] = (Source(base.shard_of[first], first), pairs.only_tuned[name])
        found.taken.add(name)
    for name, (one, two) in both.items():
        also = tie.head if tie and name == tie.embedding and not tie.is_stored(base) and tie.head not in apart else None
        _sort(base, name, one, two, also, selection, embed, bias, found)
    return found


def _sort(
    base: Checkpoint,
    name: str,
    one: Source,
    two: Source,
    also: str | None,
    selection: Selection,
    embed: str,
    bias: bool,
    found: Sorted,
) -> None:
    """One tensor of both sides to its place."""
    floats = one.spec.dtype in TORCH_FLOATS and two.spec.dtype in TORCH_FLOATS
    if not floats or not one.spec.size or not one.spec.shape:
        if one.spec == two.spec and one.file.read(one.name) == two.file.read(two.name):
            found.unchanged += 1
        else:
            found.left_out[name] = None
        return
    module = module_of(name)
    path = module_of(found.in_model(name)) if found.in_model else module
    what = role(module, len(one.spec.shape), True)
    if found.in_model:
        what = role_in_model(base, name, found.in_model(name), one.spec)
    grown = one.spec.shape != two.spec.shape
    if grown and (what not in ("embedding", "head") or one.spec.shape[1:] != two.spec.shape[1:]):
        raise InputError(f"is {one.spec.shape} in the base and {two.spec.shape} in the tuned model", culprit=name)
    if not grown and equal_rows(one, two) and (one.spec == two.spec or equal_rows(two, one)):
        found.unchanged += 1
        return
    selected = selection.selects(module)
    vocabulary = what in ("embedding", "head")
    if selected and vocabulary and (grown or embed == "full"):
        _keep_whole(found, name, two, also)
        if not grown:
            _measure(found, name, one, two)
    elif selected and what and not (vocabulary and embed == "skip"):
        found.low_rank[name] = Change(name, kind_of(base.model_types, module, what), one, two, also)
    elif selected and bias and name.endswith((".bias", ".weight")) and _is_small(base, path, one):
        _measure(found, name, one, two)
        _keep(base, found, name, two)
    else:
        if not grown:
            _measure(found, name, one, two)
        found.left_out[name] = math.sqrt(found.norms[name][1]) if name in found.norms else None


def _is_small(base: Checkpoint, path: str, one: Source) -> bool:
    """Biases and norms, and routers that no factors can change."""
    return len(one.spec.shape) == 1 or (len(one.spec.shape) == 2 and is_bare_router(base, path))


def _measure(found: Sorted, name: str, one: Source, two: Source) -> None:
    between = difference(one, two, torch.device("cpu"))
    if len(one.spec.shape) > 1:
        found.matrices.add(name)
    found.norms[name] = (between.base_squared, float(between.D.double().square().sum()))


def _keep_whole(found: Sorted, name: str, two: Source, also: str | None) -> None:
    for each in (name, also):
        if each:
            found.exact[each] = two
            found.saved.add(module_of(each))


def _keep(base: Checkpoint, found: Sorted, name: str, two: Source) -> None:
    """A norm's module whole, with the bias that may not have changed; a bias by itself."""
    found.exact[name] = two
    if name.endswith(".bias"):
        found.biased = True
        return
    module = name.removesuffix(".weight")
    found.saved.add(module)
    bias = f"{module}.bias"
    if bias in base.specs:
        found.exact.setdefault(bias, Source(base.shard_of[bias], bias))


@dataclass(frozen=True)
class Plan:
    """An adapter whose ranks are known: the specs of its tensors, what loads one, and its config."""

    specs: Mapping[str, TensorSpec]
    load: Callable[[str], torch.Tensor]
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    effective_rank: Callable[[str], float]
    stored: Callable[[str], float]


def plan_adapter(
    found: Sorted,
    factored: Mapping[str, Factored],
    ranks: Mapping[str, int],
    spool: FactorSpool,
    dtype: torch.dtype,
    base: Checkpoint,
    base_name: str,
) -> Plan:
    in_model = found.in_model or str
    own = {in_model(name): name for name in factored}
    heads = {in_model(name): in_model(change.also) for name, change in found.low_rank.items() if change.also}
    layout = lay_out(
        {path: factored[name].kind for path, name in own.items()},
        {path: ranks[name] for path, name in own.items() if name in ranks},
        heads,
    )
    modules = layout.modules
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    specs: dict[str, TensorSpec] = {}
    letters = SAFETENSORS[str(dtype).removeprefix("torch.")]

    def factors(name: str, turned: bool, side: int) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            pair = spool.tensors(factored[name], ranks[name], dtype)
            return pair[1 - side].T.contiguous() if turned else pair[side]

        return load

    for wrapper, (path, turned) in layout.wrappers.items():
        name = own[path]
        kind = KINDS["head" if turned else factored[name].kind]
        shapes = factor_shapes(factored[name].kind, factored[name].shape, ranks[name])
        for side, key in enumerate(kind.keys):
            tensors[f"{wrapper}.{key}"] = factors(name, turned, side)
            specs[f"{wrapper}.{key}"] = TensorSpec(letters, shapes[1 - side][::-1] if turned else shapes[side])
    for name, source in found.exact.items():
        path = in_model(name)
        owner = path.rpartition(".")[0]
        key = f"{owner}.base_layer.bias" if path.endswith(".bias") and owner in modules else path
        tensors[key] = lambda source=source: source.file.tensor(source.name)  # type: ignore[misc]
        specs[key] = source.spec
    if not layout.wrappers:
        _stand_in(base, in_model, tensors, specs, modules, letters, dtype)
    config = lora_config(
        modules,
        layout.parameters,
        bias="all" if found.biased else "none",
        base_model_name_or_path=base_name,
        modules_to_save=sorted(map(in_model, found.saved)) or None,
    )
    return Plan(
        specs,
        lambda key: tensors[key](),
        config,
        ranks,
        lambda name: spool.effective_rank(factored[name], ranks[name]),
        lambda name: spool.stored(factored[name], ranks[name], dtype),
    )


def _stand_in(
    base: Checkpoint,
    in_model: Callable[[str], str],
    tensors: dict[str, Callable[[], torch.Tensor]],
    specs: dict[str, TensorSpec],
    modules: dict[str, int],
    letters: str,
    dtype: torch.dtype,
) -> None:
    """One pair of zeros: PEFT loads no adapter that targets nothing, not even one of biases alone."""
    for name, spec in base.specs.items():
        module = module_of(in_model(name))
        if role_in_model(base, name, in_model(name), spec) == "linear":
            turned = stores_transposed(base.model_types, module)
            out, inp = spec.shape[::-1] if turned else spec.shape
            for key, shape in (("lora_A.weight", (1, inp)), ("lora_B.weight", (out, 1))):
                specs[f"{module}.{key}"] = TensorSpec(letters, shape)
                tensors[f"{module}.{key}"] = lambda shape=shape: torch.zeros(shape, dtype=dtype)  # type: ignore[misc]
            modules[module] = 1
            bias = f"{module}.bias"
            if bias in specs:
                specs[f"{module}.base_layer.bias"] = specs.pop(bias)
                tensors[f"{module}.base_layer.bias"] = tensors.pop(bias)
            return
