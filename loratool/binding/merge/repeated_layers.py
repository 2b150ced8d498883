"""Make the model that an adapter is for if it repeats layers of the base (PEFT's `layer_replication`).

The adapter's modules have the numbers of the deeper model, and a merge writes that model. PEFT's own merge is wrong
there, because copies of a layer share their tensors: every update of one is added to all (huggingface/peft#1707).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...adapters.adapter import Adapter
from ...adapters.config import layer_runs
from ...architectures.repeated_layers import find_layers, with_layers
from ...errors import InputError, NeedsFlag
from ...files.checkpoint import Checkpoint
from ...files.layer_numbers import RepeatedLayers
from ...files.repeated_layers import repeat_layers

_BY_HAND = (
    "write the deeper model yourself, set layer_replication to null in the adapter's config, and merge into that model"
)


def with_repeated_layers(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the model that repeats layers of the base as the adapters say; the base if they say nothing.

    Raises:
        InputError: the adapters do not agree, the base has not these layers, or its files or its class do not allow it.
    """
    layers = {adapter.config.layers: adapter for adapter in reversed(adapters)}
    if not any(layers):
        return base
    first = next(adapter for numbers, adapter in layers.items() if numbers)
    if len(layers) > 1:
        other = next(adapter for adapter in adapters if adapter.config.layers != first.config.layers)
        raise InputError(
            f"repeats layers of the base (layer_replication), and {other.name} is for other layers",
            culprit=first.name,
            remedy="merge one of them, then the other if it was trained on the result",
        )
    numbers = first.config.layers
    for is_so, what, remedy in (
        (base.is_gguf, "a GGUF model", "merge into the base in transformers' format, and convert the result"),
        (base.quantized is not None, "quantized", "merge into the base in 16 or 32 bits, and quantize the result"),
        (bool(base.parts), "a pipeline", _BY_HAND),
        (
            any(shard.scattered for shard in base.shards),
            "the state of a training run",
            "convert it first (loratool convert)",
        ),
        (not base.config, "without a config.json", "put it beside the base"),
    ):
        if is_so:
            raise _refused(base, first, f"is {what}, so its layers cannot be repeated", remedy)
    found = find_layers(base.stored, base.model_type)
    if found is None:
        what = "has no layers where PEFT repeats them (layers, encoder.layer, h), numbered from 0"
        raise _refused(base, first, what, _BY_HAND)
    path, count = found
    if max(numbers) >= count:
        message = f"repeats layer {max(numbers)} of the base (layer_replication), which has {count}"
        raise InputError(message, culprit=first.name, remedy=first.base_hint or "is this the adapter's base?")
    try:
        config = with_layers(base.config, count, numbers)
    except InputError as error:
        raise _refused(base, first, f"has layers that cannot be repeated: {error.message}", _BY_HAND) from error
    return repeat_layers(base, RepeatedLayers(path, numbers), config)


def _refused(base: Checkpoint, adapter: Adapter, why: str, remedy: str) -> InputError:
    what = f"{why}; {adapter.name} is for a model that repeats them (layer_replication)"
    return InputError(what, culprit=str(base.path), remedy=remedy)


def require_all_layers(base: Checkpoint) -> None:
    """Raise NeedsFlag if a model that repeats layers lacks one, which no undo file could restore."""
    if base.layers is None:
        return
    numbers = map(base.layers.number_of, base.original.stored)
    absent = [number for number in numbers if number is not None and number not in base.layers.copies]
    if absent:
        message = f"has layer {min(absent)}, which the output does not have (layer_replication), so no undo file can"
        raise NeedsFlag(f"{message} restore it", culprit=str(base.path), flags="--no-undo")


def notes_on_layers(base: Checkpoint) -> Iterator[str]:
    """Yield a note for a model that repeats layers."""
    if base.layers:
        numbers = base.layers.numbers
        yield f"the output has {len(numbers)} layers, the base's {layer_runs(numbers)} (layer_replication)"
