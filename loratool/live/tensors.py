"""Find the tensors of a module or a state dict by the names that adapters use, and refuse those that cannot change.

A wrapper's part in a name is left out: torch.compile's, that of a parallel module, of activation checkpoints, of PEFT.
Tensors that share all of their memory are one tensor, under the first of their names.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UsageError
from ..files.dtypes import TORCH_FLOATS
from .strided import type_name

Model = nn.Module | Mapping[str, Tensor]

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer", "original_module"}

WRAPPED = ("base_layer", "original_module")  # what PEFT's wrapper around a layer calls the layer

IN_FRONT = ("module.", "base_model.model.")  # of all names of a parallel module, and of a PeftModel

LOADED = "load the model in 16 or 32 bits"


@dataclass(frozen=True)
class LiveTensors:
    """The tensors of a model in memory.

    Attributes:
        title: of the model, for messages.
        named: name in adapters -> tensor; of tensors that share all their memory, only the first.
        aliases: name of another -> its name in `named`.
        config: as config.json has it; empty if the model has none.
    """

    title: str
    named: Mapping[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def places(self) -> dict[str, Hashable]:
        """Return where each tensor is, by name."""
        return {name: memory_key(x) for name, x in self.named.items()}


def find_tensors(model: Model) -> LiveTensors:
    """Find the tensors of a model that adapters can name.

    Raises:
        UsageError: it is neither a module nor a mapping from names to tensors.
        InputError: it is sharded or quantized in a way that hides its weights.
    """
    stored = dict(_stored(model))
    _refuse_hidden(stored)
    named: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, x in zip(_plain_names(stored), stored.values(), strict=True):
        if name is None or type_name(x) is None:
            continue
        if name in named or name in aliases:
            raise InputError("is the name of two tensors", culprit=name, remedy="pass the inner model alone")
        if x.numel() and (holder := first.setdefault(memory_key(x), name)) != name:
            aliases[name] = holder
        else:
            named[name] = x
    title = type(_inner(model)).__name__ if isinstance(model, nn.Module) else "state dict"
    return LiveTensors(title, named, aliases, _config(model))


def _stored(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield what a state dict of the model has, without the hooks that change it."""
    if not isinstance(model, nn.Module):
        if not isinstance(model, Mapping) or not all(isinstance(x, Tensor) for x in model.values()):
            raise UsageError("the first argument must be a module, or a mapping from names to tensors")
        yield from model.items()
        return
    for path, module in model.named_modules(remove_duplicate=False):
        before = f"{path}." if path else ""
        passing = module._non_persistent_buffers_set
        tensors = [*module._parameters.items(), *((k, b) for k, b in module._buffers.items() if k not in passing)]
        yield from ((before + key, x) for key, x in tensors if x is not None)


def _inner(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers around all of a model."""
    while len(children := dict(model.named_children())) == 1 and (name := next(iter(children))) in WRAPPERS | {
        "module",
        "base_model",
    }:
        model = children[name]
        if name == "base_model" and isinstance(getattr(model, "model", None), nn.Module):
            model = model.model  # type: ignore[assignment]  # PEFT's tuner holds it there
    return model


def _plain_names(stored: Mapping[str, Tensor]) -> Iterator[str | None]:
    """Yield the name of each tensor without wrappers; None for a tensor that only a wrapper has."""
    wrapped = {name[: name.index(f".{part}.") + 1] for name in stored for part in WRAPPED if f".{part}." in name}
    fronts: list[str] = []
    names = list(stored)
    for front in IN_FRONT:
        if names and all(name.startswith(front) for name in names):
            fronts.append(front)
            names = [name.removeprefix(front) for name in names]
    for name, short in zip(stored, names, strict=True):
        owner = next((each for each in _owners(name) if each in wrapped), None)
        if owner and name[len(owner) :].partition(".")[0] not in WRAPPED:
            yield None
        else:
            yield ".".join(part for part in short.split(".") if part not in WRAPPERS)


def _owners(name: str) -> Iterator[str]:
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1]
        at = name.find(".", at + 1)


def _config(model: Model) -> dict[str, Any]:
    """Return the config of a model as its config.json has it."""
    if not isinstance(model, nn.Module):
        return {}
    inner = _inner(model)
    config: Any = getattr(inner, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else {}
    if fields and not fields.get("architectures") and "_class_name" not in fields:
        fields["architectures"] = [type(inner).__name__]
    return {key: value for key, value in fields.items() if value is not None}


def memory_key(x: Tensor) -> Hashable:
    """Return a key that is equal for tensors that share all of their memory."""
    if not has_memory(x):
        return id(x)
    return str(x.device), x.data_ptr(), x.dtype, tuple(x.shape), x.stride()


def _is_plain(x: Tensor) -> bool:
    """Return whether a tensor's numbers are those in its memory, as of no subclass that means others by them."""
    return type(x) in (Tensor, nn.Parameter)


def has_memory(x: Tensor) -> bool:
    """Return whether a tensor's numbers are in its memory, by its strides."""
    return _is_plain(x) and not x.is_meta and x.layout == torch.strided


def _refuse_hidden(stored: Mapping[str, Tensor]) -> None:
    """Raise InputError for weights whose names or shapes are not those of the model, as of flat or packed ones."""
    for name, x in stored.items():
        if hasattr(x, "ds_id") and not x.numel():
            remedy = "merge inside deepspeed.zero.GatheredParameters, or merge the files"
            raise InputError("is a shard of DeepSpeed's ZeRO", culprit=name, remedy=remedy)
        if getattr(x, "_is_flat_param", False):
            remedy = "merge before it wraps the model, inside summon_full_params, or merge the files"
            raise InputError("is a flat parameter of FSDP", culprit=name, remedy=remedy)
        if not _is_plain(x) and not x.is_meta and not x.dtype.is_floating_point:
            raise InputError(f"is quantized ({type(x).__name__})", culprit=name, remedy=LOADED)


def refuse_unchangeable(name: str, x: Tensor) -> None:
    """Raise InputError for a tensor whose memory cannot be changed, or must not be."""
    fault, remedy = _fault(x)
    if fault:
        raise InputError(fault, culprit=name, remedy=remedy)


def _fault(x: Tensor) -> tuple[str, str]:
    """Return why a tensor cannot be changed, and the remedy; empty if it can."""
    kind = type(x).__name__
    if kind == "DTensor":
        return "is a DTensor, of which each rank has a shard", "merge before the model is sharded, or merge the files"
    if kind == "FakeTensor":
        return "is fake: it has no values", "merge outside of FakeTensorMode"
    if x.is_meta:
        return "is on the meta device: it has no values", "load the model without offloading"
    if not _is_plain(x):
        return f"is of the class {kind}, whose numbers are not those in its memory", LOADED
    if x.layout != torch.strided:
        return f"is stored as {x.layout}", "pass it as a dense tensor"
    if x.grad_fn is not None:
        return "is the result of operations that autograd recorded", "pass the module, or detach() it"
    if x.device.type not in ("cpu", "cuda"):
        return f"is on {x.device.type}, which has no float64", "move the model to the CPU or to CUDA"
    if x.device.type == "cpu" and x.is_shared():  # type: ignore[no-untyped-call]
        return "is in memory that other processes share", "stop them, and pass a clone of it"
    if x.device.type == "cuda" and type_name(x) not in TORCH_FLOATS:
        return f"is {type_name(x)} on a GPU", "move the model to the CPU"
    if _is_folded(x):
        return "is an overlapping view: some of its numbers are one in memory", "pass a clone of it"
    return "", ""


def span_of(x: Tensor) -> tuple[str, int, int]:
    """Return the device of a tensor, the address of its first byte, and the address after its last byte."""
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return str(x.device), x.data_ptr(), x.data_ptr() + reach * x.element_size()


def refuse_overlaps(tensors: LiveTensors, changed: Iterable[str]) -> None:
    """Raise InputError for a changed tensor that shares a part of its memory with another one.

    A view of rows or columns of a tensor, as of a fused one, is written through if only one of the two changes.
    """
    wanted = set(changed)
    spans = {n: span_of(x) for n, x in tensors.named.items() if x.numel() and has_memory(x)}
    rising = sorted(spans, key=lambda name: spans[name])
    last: list[str] = []  # whose spans may reach the next one's
    for name in rising:
        device, start, _ = spans[name]
        last = [each for each in last if spans[each][0] == device and spans[each][2] > start]
        for other in last:
            if name in wanted or other in wanted:
                _refuse_overlap(name, other, tensors.named, wanted)
        last.append(name)


def _refuse_overlap(name: str, other: str, tensors: Mapping[str, Tensor], changed: set[str]) -> None:
    shared = _shared_numbers(tensors[name], tensors[other])
    if not shared:
        return
    if name in changed and other in changed:
        what = f"shares memory with {other}, and both would change"
        raise InputError(what, culprit=name, remedy="exclude one of them")
    if shared not in (tensors[name].numel(), tensors[other].numel()):
        what = f"shares a part of its memory with {other}, and neither is a view of the other"
        raise InputError(what, culprit=name, remedy="pass clones of them")


def _shared_numbers(x: Tensor, y: Tensor) -> int:
    """Return how many numbers two tensors share whose spans overlap."""
    if x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype:
        (_, start, stop), (_, first, last) = span_of(x), span_of(y)
        return (min(stop, last) - max(start, first)) // x.element_size()
    (_, start, stop), (_, first, last) = span_of(x), span_of(y)
    begin, end = min(start, first), max(stop, last)
    marks = torch.zeros(end - begin, dtype=torch.uint8)
    _bytes(marks, x, start - begin).fill_(1)
    return int(_bytes(marks, y, first - begin).sum(dtype=torch.int64)) // y.element_size()


def _bytes(marks: Tensor, x: Tensor, offset: int) -> Tensor:
    """Return the marks of a tensor's bytes."""
    size = x.element_size()
    return marks.as_strided((*x.shape, size), (*(step * size for step in x.stride()), 1), offset)


def _is_folded(x: Tensor) -> bool:
    """Return whether two of a tensor's numbers are one in memory, as where it is expanded."""
    axes = sorted((step, n) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1)
    if all(step for step, _ in axes) and all(a[0] * a[1] <= b[0] for a, b in pairwise(axes)):
        return False
    _, start, stop = span_of(x)
    marks = torch.zeros(stop - start, dtype=torch.uint8)
    _bytes(marks, x, 0).fill_(1)
    return int(marks.sum(dtype=torch.int64)) < x.numel() * x.element_size()
