"""The inputs of verbs that apply adapters to a base: opened, and refused where they cannot belong together."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TypeGuard

from ..adapters.adapter import Adapter
from ..adapters.formats import is_adapter, open_adapter
from ..adapters.formats.peft import WEIGHTS_NAMES
from ..adapters.formats.peft_config import base_mutating_init
from ..architectures.image import WEIGHED, weighed_component
from ..errors import InputError, NeedsFlag, UsageError
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.fileio import sha256_file
from ..files.side_files import INITIAL
from .collector import uncollected

WeightedAdapter = tuple[tuple[Adapter, float], ...]


AdapterPath = str | os.PathLike[str]


AdapterArgument = AdapterPath | tuple[AdapterPath, float] | tuple[AdapterPath, float, Mapping[str, float]]


AdapterWeights = Mapping[str, float] | Mapping[Path, float] | Mapping[AdapterPath, float]  # keys are invariant


# not Iterable, which a mapping to anything is too
Adapters = AdapterArgument | Sequence[AdapterArgument] | Iterator[AdapterArgument] | AdapterWeights


TAKEN = "a path, (path, weight), (path, weight, {component: weight}), several of these in a list, or {path: weight}"


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter as the user names it; `parts` are weights of its components, by the names in `WEIGHED`."""

    path: str
    weight: float = 1.0
    component_weights: Mapping[str, float] = field(default_factory=dict)


def parse_adapters(adapters: Adapters) -> list[AdapterRequest]:
    """Raises UsageError for what is none of TAKEN."""
    each: list[object]
    if isinstance(adapters, Mapping):
        each = list(adapters.items())
    elif isinstance(adapters, str | os.PathLike) or (
        _is_weighted(adapters) and not isinstance(adapters[1], str | os.PathLike | tuple)  # else a tuple of adapters
    ):
        each = [adapters]
    elif isinstance(adapters, Iterable) and not isinstance(adapters, bytes):
        each = list(adapters)
    else:
        raise _not_taken(adapters)
    if not each:
        raise UsageError("no adapter is given")
    return [_read_one(one) for one in each]


def _is_weighted(given: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(given, tuple) and len(given) in (2, 3)


def _read_one(given: object) -> AdapterRequest:
    path, weight, parts = (*given, {})[:3] if _is_weighted(given) else (given, 1.0, {})
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str) or not isinstance(parts, Mapping):
        raise _not_taken(given)
    for part in parts:
        if part not in WEIGHED:
            raise UsageError(f"{part!r} is none of {', '.join(WEIGHED)}", culprit=name)
    return AdapterRequest(name, _weight(weight, name), {part: _weight(value, name) for part, value in parts.items()})


def _weight(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real too
        raise UsageError(f"the weight {value!r} is not a number", culprit=path, remedy=f"adapters are {TAKEN}")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight):
        raise UsageError(f"the weight {weight} is not a finite number", culprit=path)
    return weight


def _not_taken(given: object) -> UsageError:
    return UsageError(f"{reprlib.repr(given)} names no adapter", remedy=f"adapters are {TAKEN}")


@uncollected
def open_inputs(
    base: str | os.PathLike[str], given: Sequence[AdapterRequest], alpha: float | None, opened: ExitStack
) -> tuple[Checkpoint, WeightedAdapter]:
    checkpoint = open_base(base, "the first argument is the base model", opened, given)
    loaded = []
    for adapter, each in zip(open_adapters(given, alpha, opened), given, strict=True):
        for module, update in adapter.updates.items():
            weight = adapter.weight_of(module, each.weight)
            if not math.isfinite(weight * update.scale):
                raise UsageError(f"the weight {weight} times the scale {update.scale} is too large", culprit=module)
        loaded.append((adapter, each.weight))
    return checkpoint, tuple(loaded)


def open_model(name: str | os.PathLike[str], what: str, opened: ExitStack) -> Checkpoint:
    """Open a model whose numbers are all its weights. what: what this argument is.

    Raises InputError for what `open_base` refuses, and for a model with a quantized weight.
    """
    model = open_base(name, what, opened)
    for weight, coded in model.coded.items():
        raise InputError(
            f"is quantized ({coded.format}), and the codes of {weight} are no weights",
            culprit=os.fspath(name),
            remedy="pass the original model in 16 or 32 bits",
        )
    return model


def open_base(
    name: str | os.PathLike[str], what: str, opened: ExitStack, given: Sequence[AdapterRequest] = ()
) -> Checkpoint:
    """Open a model, of which some weights may be quantized. what: what this argument is; given: the adapters' place.

    Raises InputError for an adapter and for the dump of a model with adapters inside.
    """
    model = open_checkpoint(name)
    opened.callback(model.close)
    if any(".base_layer." in tensor for tensor in model.specs):
        raise InputError(
            "is a dump of a whole PeftModel, its weights under names that no loader knows",
            culprit=os.fspath(name),
            remedy="save the model with merge_and_unload().save_pretrained, or pass the original base",
        )
    refuse_adapter(model, name, what, given)
    return model


def refuse_adapter(
    model: Checkpoint, name: str | os.PathLike[str], what: str, given: Sequence[AdapterRequest] = ()
) -> None:
    """Raise InputError for an adapter in a model's place. given: what is in the adapters', and may be the model."""
    if not is_adapter(model.specs):
        return
    swapped = given and not _opens_as_adapter(given[0].path)
    remedy = f"swap them: {given[0].path} comes before {os.fspath(name)}" if swapped else None
    raise InputError(f"is an adapter, but {what}", culprit=os.fspath(name), remedy=remedy)


def _opens_as_adapter(name: str) -> bool:
    try:
        open_adapter(name).file.close()
    except NeedsFlag:
        return True
    except InputError:
        return False
    return True


def open_adapters(given: Sequence[AdapterRequest], alpha: float | None, opened: ExitStack) -> list[Adapter]:
    """Of several adapters, `alpha` is for those that lack their own, and contradicts none of the others."""
    adapters, used = [], len(given) == 1
    for each in given:
        try:
            adapter = open_adapter(each.path, alpha if len(given) == 1 else None)
        except NeedsFlag:
            if alpha is None:
                raise
            adapter, used = open_adapter(each.path, alpha), True
        opened.callback(adapter.file.close)
        adapters.append(_with_components(adapter, each.component_weights))
    if alpha is not None and not used:
        raise UsageError("--alpha is for adapters that do not say theirs, and all of these do")
    return adapters


def _with_components(adapter: Adapter, parts: Mapping[str, float]) -> Adapter:
    """The adapter with the weights of those components that it has; a part's goes before the whole's."""
    if not parts:
        return adapter
    there = {weighed_component(module) for module in adapter.updates}
    components: dict[str, float] = {}
    for name in (name for name in WEIGHED if name in parts):
        own = [component for component in WEIGHED[name] if component in there]
        if not own:
            raise UsageError(f"has no module that {name}={parts[name]:g} could weigh", culprit=adapter.name)
        components |= dict.fromkeys(own, parts[name])
    return replace(adapter, component_weights=components) if components else adapter


def negate_weights(loaded: WeightedAdapter) -> WeightedAdapter:
    """What takes the adapters' changes away again."""
    return tuple(
        (replace(a, component_weights={c: -w for c, w in a.component_weights.items()}), -weight) for a, weight in loaded
    )


def subtract_initial(
    loaded: WeightedAdapter, initial: str | os.PathLike[str] | None, residual_base: bool, opened: ExitStack
) -> WeightedAdapter:
    """Make adapters whose initialization changed the base right on the base that is given.

    PiSSA, OLoRA and CorDA train on W - s * B0 @ A0 (LoftQ on about that, up to its quantization): on W itself the
    initial adapter is to be subtracted, which is exact at twice the rank; on the changed base they are plain. A lone
    adapter need not say how it was initialized for `initial` to be subtracted: ours never does. Raises NeedsFlag where
    neither is said.
    """
    if initial is not None and residual_base:
        raise UsageError("--initial and --residual-base exclude each other")
    moved = [(adapter, weight, init) for adapter, weight in loaded if (init := base_mutating_init(adapter.config))]
    if not moved and initial is not None and len(loaded) == 1:
        moved = [(*loaded[0], "factors of the base")]
    if not moved:
        if initial is not None or residual_base:
            flag = "--initial" if initial is not None else "--residual-base"
            raise UsageError(f"{flag} is for adapters that were initialized from the base (PiSSA, ...); none was")
        return loaded
    adapter, _, init = moved[0]
    if residual_base:
        return loaded
    dora = any(update.kind == "dora" for update in adapter.updates.values())
    if dora and initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed the base under it, and is DoRA",
            culprit=adapter.name,
            remedy="add --residual-base if the base given is the changed one; from DoRA no start can be subtracted",
        )
    if initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed the base under it: on the original base it is wrong",
            culprit=adapter.name,
            remedy="add --initial ADAPTER with the adapter as it was before training, or --residual-base if the base "
            "given is the changed one",
        )
    if len(moved) > 1:
        names = " and ".join(adapter.name for adapter, _, _ in moved)
        raise InputError(f"{names} each have a start of their own", remedy="merge them one after the other")
    start = open_adapter(initial)
    opened.callback(start.file.close)
    own = {m: u for m, u in start.updates.items() if u.kind in ("lora", "experts") and m in adapter.updates}
    start = replace(start, updates=own)  # what else it has was not subtracted when the adapter was trained
    _check_initial(adapter, start)
    return (*loaded, *negate_weights(((replace(start, component_weights=adapter.component_weights), moved[0][1]),)))


def require_residual_base(base: Checkpoint, loaded: WeightedAdapter) -> None:
    """Refuse an adapter that `init` started on a residual base, where another base is given."""
    for adapter, _ in loaded:
        named = adapter.config.base_model
        start = Path(named, INITIAL) if isinstance(named, str) and named else None
        if start is None or not (start / WEIGHTS_NAMES[0]).is_file():
            continue
        own = base.folder / INITIAL / WEIGHTS_NAMES[0]
        if own.is_file() and sha256_file(own) == sha256_file(start / WEIGHTS_NAMES[0]):
            continue
        what = f"was started on {named}, from which its factors were taken out: on another base it is wrong"
        if len(loaded) > 1 or any(update.kind == "dora" for update in adapter.updates.values()):
            raise InputError(what, culprit=adapter.name, remedy=f"pass {named} as the base")
        raise NeedsFlag(what, culprit=adapter.name, remedy=f"add --initial {start}, or pass {named} as the base")


def _check_initial(adapter: Adapter, start: Adapter) -> None:
    """The start must have the adapter's low-rank modules at the same scale; what else it has was not subtracted."""
    if start.file.path.resolve() == adapter.file.path.resolve():
        raise UsageError("is the adapter itself, not what it was before training", culprit=start.name)
    for module, update in adapter.updates.items():
        if update.kind == "dora":
            raise InputError("is DoRA, from which no initial adapter can be subtracted", culprit=module)
        other = start.updates.get(module)
        if update.kind in ("lora", "experts") and (
            other is None or other.kind != update.kind or other.shape != update.shape or other.scale != update.scale
        ):
            raise InputError(
                f"of {adapter.name} has no counterpart of its shape and scale in {start.name}", culprit=module
            )
