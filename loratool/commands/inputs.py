"""Open the inputs of commands that apply adapters to a base, and refuse inputs that do not belong together."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.config import named_base
from ..adapters.formats import ModelGiven, holds_adapter, is_adapter, open_adapter
from ..adapters.formats.peft_config import WEIGHTS_NAMES, base_mutating_init, find_config
from ..adapters.gguf_names import in_names_of_file
from ..adapters.updates.dora import DoRA
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..architectures.components import WEIGHED, weighed_component
from ..architectures.mlx_names import FORMAT, mlx_names
from ..architectures.ties import GGUF_HEAD
from ..binding.merge.repeated_layers import with_repeated_layers
from ..binding.modules.module_weights import resolve_weights
from ..binding.ties.ties import find_tie
from ..durable.fileio import sha256_file
from ..errors import InputError, NeedsFlag, UsageError, shell_word
from ..files.checkpoint import Checkpoint, is_config_alone, open_checkpoint, read_config
from ..files.codecs.quantized import remedy_of
from ..files.containers.gguf_file import GgufFile
from ..files.folder.side_files import INITIAL
from ..files.gguf_model import as_transformers, with_names_of_one
from ..streaming.ranks import current_job
from ..transform.base import Base
from ..views.parts.writing import command_line
from .adapter_requests import AdapterRequest
from .choices import DROP_CHOICES
from .collector import without_gc

WeightedAdapter = tuple[tuple[Adapter, float], ...]

NAMES_SHOWN = 4


@without_gc
def open_inputs(
    base: str | os.PathLike[str] | Checkpoint,
    requests: Sequence[AdapterRequest],
    alpha: float | None,
    opened: ExitStack,
    verb: str | None = None,
    deeper: bool = False,
) -> tuple[Checkpoint, WeightedAdapter]:
    """Open a base and the adapters with their weights; `opened` closes their files.

    Args:
        base: if it is open already, the caller closes it.
        verb: as `refuse_adapter`'s.
        deeper: if the adapters are for a model that repeats layers of the base, return that model in its place.

    Raises:
        InputError: `open_base`, `open_adapters` or `with_repeated_layers` refuses a file.
    """
    checkpoint = base
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_base(checkpoint, "the first argument must be the base model", opened, requests, verb)
    _refuse_scaled(checkpoint)
    try:
        adapters = open_adapters(requests, alpha, opened, base=checkpoint, deeper=deeper)
    except ModelGiven as error:
        words = command_line("extract", checkpoint.path, error.culprit or "")
        error.remedy = f"to extract an adapter from a full fine-tune: {words}"
        raise
    checkpoint = with_repeated_layers(checkpoint, adapters)
    return checkpoint, tuple(zip(adapters, (each.weight for each in requests), strict=True))


def share_hashes(adapters: Iterable[tuple[Adapter, float]], role: str = "adapter") -> WeightedAdapter:
    """Return the adapters with the hashes of their files. Under torchrun, rank 0 computes these for all ranks.

    Args:
        role: of these adapters, if a command has several lists of them.
    """
    job = current_job()
    if job.count == 1:
        return tuple(adapters)  # they read them when they are asked
    return tuple(
        (
            replace(
                adapter, known_sha256=job.on_rank0(f"hash of {role} {number}", partial(getattr, adapter, "sha256"))
            ),
            weight,
        )
        for number, (adapter, weight) in enumerate(adapters)
    )


def is_of_mlx(base: Checkpoint) -> bool:
    """Return whether mlx-lm saved a model: it marks each file."""
    return any((shard.metadata or {}).get("format") == FORMAT for shard in base.shards)


def _refuse_scaled(base: Checkpoint) -> None:
    """Raise InputError for a folder of MLX whose weights are multiples of those in training."""
    names = mlx_names(base.model_types)
    if names and names.scaled and is_of_mlx(base):
        raise InputError(
            f"is a {base.model_type} of mlx-lm, which has multiplied the weights by values of the config",
            culprit=os.fspath(base.path),
            remedy="pass the original model, or let mlx_lm.fuse merge it",
        )


def open_model(name: str | os.PathLike[str], what: str, opened: ExitStack) -> Checkpoint:
    """Open a model, and check that all weights can be read as numbers. A GGUF model gets the names of transformers.

    Args:
        what: a clause that names this argument, for the message.

    Raises:
        InputError: a weight is quantized in a format that no codec reads, or `open_base` refuses the model.
    """
    model = open_base(name, what, opened)
    for weight, coded in model.coded.items():
        why = f": {coded.fault}" if coded.fault else ""
        raise InputError(
            f"is quantized ({coded.format}), and the codes of {weight} cannot be read{why}",
            culprit=os.fspath(name),
            remedy=remedy_of(coded.format),
        )
    (renamed,) = with_names_of_one([model])
    return renamed


def given_base(name: str | os.PathLike[str], opened: ExitStack) -> Base:
    """Return the model of --base for a conversion. `opened` closes its weights."""
    return Base(os.fspath(name), read_config(name), is_config_alone(name), lambda what: open_model(name, what, opened))


def refuse_own_names(model: Checkpoint) -> None:
    """Raise InputError with the reason for a GGUF model that keeps its own names in `open_model`."""
    if model.is_gguf:
        as_transformers(model)


def open_base(
    name: str | os.PathLike[str],
    what: str,
    opened: ExitStack,
    requests: Sequence[AdapterRequest] = (),
    verb: str | None = None,
) -> Checkpoint:
    """Open a model. Some of its weights may be quantized.

    Args:
        what: a clause that names this argument, for the message.
        requests: the arguments for adapters, one of which may be the model by mistake.
        verb: as `refuse_adapter`'s.

    Raises:
        InputError: it is an adapter, or the dump of a model with adapters inside.
    """
    model = open_checkpoint(name)
    opened.callback(model.close)
    if any(".base_layer." in tensor for tensor in model.specs):
        raise InputError(
            "is a dump of a PeftModel, and no loader knows the names of its weights",
            culprit=os.fspath(name),
            remedy="save the model with merge_and_unload().save_pretrained, or pass the original base",
        )
    refuse_adapter(model, name, what, requests, verb)
    return model


def refuse_adapter(
    model: Checkpoint,
    name: str | os.PathLike[str],
    what: str,
    requests: Sequence[AdapterRequest] = (),
    verb: str | None = None,
) -> None:
    """Raise InputError for an adapter in place of a model. The first of `requests` may be the model.

    Args:
        verb: the command, if its only arguments are the model and the adapters.
    """
    if not is_adapter(model.specs):
        return
    remedy = f"to see what it has: {command_line('inspect', name)}"
    if requests and _is_model(requests[0].path):
        first = requests[0].path
        remedy = f"swap them: {shell_word(first)} comes before {shell_word(name)}"
        if verb and requests == [AdapterRequest(first)]:
            remedy = f"swap them: {command_line(verb, first, name)}"
    elif requests and (named := named_base(find_config(model.shards[0])[0].get("base_model_name_or_path"))):
        remedy = f"its base is {shell_word(named)}"
    raise InputError(f"is an adapter, but {what}", culprit=os.fspath(name), remedy=remedy)


def _is_model(name: str) -> bool:
    """Return whether the files at a path are those of a model. The path may not exist."""
    try:
        return not holds_adapter(name)
    except InputError:
        return False


@contextmanager
def without_base_option(base: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Reword an error that asks for --base if that does not help.

    Args:
        base: the value of --base, a model without a config.json. None if the command has no --base; then the remedy
            is to run `convert` first, which has it.

    Raises:
        InputError: the reworded one.
    """
    try:
        yield
    except NeedsFlag as error:
        if not error.asks_for("--base"):
            raise
        reworded = error.elsewhere("loratool convert --to peft")
        if base is not None:
            reworded.remedy = f"{shell_word(base)} has no config.json: copy the model's into it"
        raise reworded from error


def open_adapters(
    requests: Sequence[AdapterRequest],
    alpha: float | None,
    opened: ExitStack,
    model: Mapping[str, Any] | None = None,
    base: Checkpoint | None = None,
    has_base_option: bool = False,
    deeper: bool = False,
) -> list[Adapter]:
    """Open the adapters of a command. `opened` closes their files.

    Args:
        alpha: the value of --alpha. With one adapter it must agree with the file. With several it fills in where a file
            has none, and is ignored for the others.
        model: the config.json of the base, if the command has a base and `base` is not given.
        base: the model that they are, or were, applied to. If it is a GGUF file, they get its names.
        has_base_option: whether the command has --base, which an error may ask for.
        deeper: as `open_adapter`'s.

    Raises:
        NeedsFlag: an adapter has no alpha, and none was given; or as `leave_out`.
        UsageError: --alpha was given, and every adapter has its own; or a component with a weight is not there.
        InputError: as `leave_out`.
    """
    adapters, used = [], len(requests) == 1
    file = next(iter(base.shards), None) if base else None
    if base:
        model = None if isinstance(file, GgufFile) else base.config
    for request in requests:
        with nullcontext() if has_base_option else without_base_option():
            try:
                known = alpha if len(requests) == 1 else None
                adapter = open_adapter(request.path, known, model=model, deeper=deeper)
            except NeedsFlag:
                if alpha is None:
                    raise
                adapter, used = open_adapter(request.path, alpha, model=model, deeper=deeper), True
        opened.callback(adapter.file.close)
        adapters.append(adapter)
    if alpha is not None and not used:
        raise UsageError("--alpha is for adapters that do not store theirs, but all of these do")
    left = leave_out(adapters, requests[0].drop if requests else ())
    if isinstance(file, GgufFile) and base:
        has_head = GGUF_HEAD in base.specs or find_tie(base) is not None
        left = [in_names_of_file(adapter, file, has_head) for adapter in left]
    return [
        replace(adapter, module_weights=resolve_weights(adapter, request.module_weights))
        for adapter, request in zip(left, requests, strict=True)
    ]


def leave_out(adapters: Sequence[Adapter], drop: Sequence[str]) -> list[Adapter]:
    """Return the adapters of a command without the modules and tensors of --drop.

    Args:
        drop: keys of DROP_CHOICES.

    Raises:
        UsageError: a word is no key.
        NeedsFlag: an adapter has extras, and they are not named.
        InputError: no adapter has a named component, or nothing is left of an adapter.
    """
    for word in drop:
        if word not in DROP_CHOICES:
            raise UsageError(f"--drop {word!r} is none of {', '.join(DROP_CHOICES)}")
    for adapter in adapters if "extras" not in drop else ():
        if adapter.extras:
            raise NeedsFlag(
                f"holds token embeddings, which cannot be merged into a weight: {_shortened(adapter.extras)}",
                culprit=adapter.name,
                flags="--drop extras",
                why="to exclude them",
            )
    if not drop:
        return list(adapters)
    present_components = {weighed_component(module) for adapter in adapters for module in adapter.updates}
    for word in drop:
        if word in WEIGHED and present_components.isdisjoint(WEIGHED[word]):
            present = [
                name
                for name, listed in WEIGHED.items()
                if len(listed) == 1 and not present_components.isdisjoint(listed)
            ]
            raise InputError(
                f"matches no module of {' or '.join(adapter.name for adapter in adapters)}",
                culprit=f"--drop {word}",
                remedy=f"it has modules of {', '.join(present)}" if present else None,
            )
    components = {component for word in drop for component in WEIGHED.get(word, ())}
    return [_without(adapter, components) for adapter in adapters]


def _without(adapter: Adapter, components: Collection[str]) -> Adapter:
    """Return the adapter without its extras and without the modules of these components."""
    remaining = adapter.only([module for module in adapter.updates if weighed_component(module) not in components])
    if not remaining.updates and components:
        raise InputError("has nothing left after --drop", culprit=adapter.name, remedy="do not pass this adapter")
    excluded = [module for module in adapter.updates if module not in remaining.updates]
    needed = {name for update in remaining.updates.values() for name in update.stored}
    adapter.file.hide({name for module in excluded for name in adapter.updates[module].stored} - needed)
    return replace(remaining, extras=(), excluded=(*excluded, *adapter.extras))


def _shortened(names: Sequence[str]) -> str:
    """Return the first of many names as text."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if names[NAMES_SHOWN:] else "")


def negate_weights(weighted: WeightedAdapter) -> WeightedAdapter:
    """Return the adapters with negated weights, so that adding them subtracts their updates."""
    return tuple(
        (replace(a, module_weights=tuple((name, -module_weight) for name, module_weight in a.module_weights)), -weight)
        for a, weight in weighted
    )


def subtract_initial(
    weighted: WeightedAdapter, initial: str | os.PathLike[str] | None, residual_base: bool, opened: ExitStack
) -> WeightedAdapter:
    """Return the adapters, minus the initial adapter if it is given, so that they fit the given base.

    PiSSA, OLoRA and CorDA train on W - s * B0 @ A0 (LoftQ on about that, up to its quantization). On W the initial
    adapter must be subtracted, which is exact at twice the rank. On the residual base there is nothing to do.
    `initial` is accepted for a single adapter whose config does not name such a method, as `init` writes none.

    Args:
        initial: the adapter before training.
        residual_base: whether the base is the one that the initialization left.

    Raises:
        NeedsFlag: an adapter's initialization changed its base, and neither argument is given.
        UsageError: both are given, or no adapter needs the one that is.
        InputError: the initial adapter does not fit, or several adapters have one.
    """
    if initial is not None and residual_base:
        raise UsageError("--initial and --residual-base exclude each other")
    mutating = [(adapter, weight, init) for adapter, weight in weighted if (init := base_mutating_init(adapter.config))]
    if not mutating and initial is not None and len(weighted) == 1:
        mutating = [(*weighted[0], "factors of the base")]
    if not mutating:
        if initial is not None or residual_base:
            flag = "--initial" if initial is not None else "--residual-base"
            raise UsageError(f"{flag} is for adapters that were initialized from the base (PiSSA, ...); none was")
        return weighted
    adapter, _, init = mutating[0]
    if residual_base:
        return weighted
    dora = any(update.cls is DoRA for update in adapter.updates.values())
    if dora and initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed its base, and is DoRA",
            culprit=adapter.name,
            flags="--residual-base",
            why="if you pass the changed base; no initial adapter can be subtracted from DoRA",
        )
    if initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed its base: it is wrong on the original base",
            culprit=adapter.name,
            flags="--initial ADAPTER",
            why="with the adapter before training, or --residual-base if you pass the changed base",
        )
    if len(mutating) > 1:
        names = " and ".join(adapter.name for adapter, _, _ in mutating)
        raise InputError(f"{names} each have an initial adapter", remedy="merge them one after the other")
    with without_base_option():
        initial_adapter = open_adapter(initial)  # its extras do not matter: only its factors are subtracted
    opened.callback(initial_adapter.file.close)
    factored = [m for m, u in initial_adapter.updates.items() if u.cls in (LowRank, Experts)]
    matching = [module for module in factored if module in adapter.updates]
    initial_adapter = initial_adapter.only(matching)  # only these were subtracted from the base
    _check_initial(adapter, initial_adapter)
    return (
        *weighted,
        *negate_weights(((replace(initial_adapter, module_weights=adapter.module_weights), mutating[0][1]),)),
    )


def open_initial(source: Adapter, initial: str | os.PathLike[str], opened: ExitStack) -> Adapter:
    """Open an adapter as it was before training. `opened` closes it. Raise the errors of `subtract_initial`."""
    (_, (before, _)) = subtract_initial(((source, 1.0),), initial, False, opened)
    return before


def require_residual_base(base: Checkpoint, weighted: WeightedAdapter) -> None:
    """Refuse an adapter that `init` made for a residual base if the base is another one.

    Raises:
        NeedsFlag: the initial adapter can be subtracted instead.
        InputError: it cannot, because there are several adapters or a DoRA.
    """
    for adapter, _ in weighted:
        named = adapter.config.base_model
        if not named or not ((initial := Path(named, INITIAL)) / WEIGHTS_NAMES[0]).is_file():
            continue
        initial_file = base.root / INITIAL / WEIGHTS_NAMES[0]
        if initial_file.is_file() and sha256_file(initial_file) == sha256_file(initial / WEIGHTS_NAMES[0]):
            continue
        what = f"was initialized on {named}, from which its factors were subtracted: it is wrong on another base"
        if len(weighted) > 1 or any(update.cls is DoRA for update in adapter.updates.values()):
            raise InputError(what, culprit=adapter.name, remedy=f"pass {shell_word(named)} as the base")
        or_base = f", or pass {shell_word(named)} as the base"
        raise NeedsFlag(what, culprit=adapter.name, flags=f"--initial {shell_word(initial)}", why=or_base)


def _check_initial(adapter: Adapter, initial: Adapter) -> None:
    """Raise an error unless the initial adapter has all low-rank modules of the adapter, at the same scale."""
    if initial.file.path.resolve() == adapter.file.path.resolve():
        raise UsageError("is the adapter itself, not the one before training", culprit=initial.name)
    for module, update in adapter.updates.items():
        if update.cls is DoRA:
            raise InputError("is DoRA, and no initial adapter can be subtracted from it", culprit=module)
        other = initial.updates.get(module)
        if update.cls in (LowRank, Experts) and (
            other is None or other.cls is not update.cls or other.shape != update.shape or other.scale != update.scale
        ):
            raise InputError(
                f"is in {adapter.name}, but {initial.name} has no module of its shape and scale", culprit=module
            )
