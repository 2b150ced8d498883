"""Recognize and open adapters in every known format; each format is a module and a row of `FORMATS`.

`open_adapter` asks the rows in order whether a file's tensor names are of their format. The first that claims them
reads the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...durable.fileio import reading
from ...errors import InputError, LoratoolError, UsageError, shell_word
from ...files.checkpoint import find_weights, open_checkpoint, open_weights
from ...files.dtypes import TensorSpec
from ...files.folder.model_folder import INDEX_NAMES, is_pipeline
from ...files.hub.cache import resolve
from ...files.hub.choice import ADAPTER_NAMES
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from .adapterhub import AdapterHub
from .cloneofsimo import Cloneofsimo
from .comfy import Comfy
from .content import ONLY_FOR
from .diffusers import Diffusers
from .extras import find_extras
from .find import find_adapter_file, notes_on_choice
from .format import BASES, Capabilities, Format, ReadOptions
from .gguf import LlamaCpp
from .kohya import Kohya
from .litgpt import Litgpt
from .loralib import Loralib
from .megatron import Megatron
from .mlx import Mlx
from .other_methods import (
    BIASES,
    EMBEDDINGS,
    UNKNOWN_LORA,
    OtherMethod,
    is_all_lora,
    is_biases,
    is_embeddings,
    other_method,
)
from .peft import Peft
from .peft_config import CONFIG_NAME, WEIGHTS_NAMES, find_config
from .sam import Sam
from .torchtune import Torchtune

# key -> format; if several claim a file, the first reads it
FORMATS: dict[str, Format] = {
    each.key: each
    for each in (
        Cloneofsimo(),
        Kohya(),
        Comfy(),
        Diffusers(),
        AdapterHub(),
        LlamaCpp(),
        Torchtune(),
        Litgpt(),
        Loralib(),
        Megatron(),
        Mlx(),
        Sam(),
        Peft(),
    )
}


class ModelGiven(InputError):
    """A model was given where an adapter is expected."""


def written_formats() -> dict[str, Format]:
    """Return the writable formats by key; the usual formats of bases come first, in the order of BASES."""
    order = {each: i for i, each in enumerate(BASES)}
    formats = sorted(FORMATS.values(), key=lambda each: order.get(each.can.usual_for or "", len(order)))
    return {each.key: each for each in formats if each.can.writes}


def loaded_by(runtime: str) -> Format:
    """Return the format that a runtime (a key of PROGRAMS) reads; by default the usual format of a model."""
    return next((each for each in FORMATS.values() if runtime in each.loaded_by), usual_format("model"))


def usual_format(base: str) -> Format:
    """Return the default format of an adapter for a base, one of BASES."""
    return next(each for each in FORMATS.values() if each.can.usual_for == base)


def capabilities(adapter: Adapter) -> Capabilities:
    """Return what files of an adapter's format can store."""
    return FORMATS[adapter.format].can


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether a format claims the names. No format claims only biases, which can be a shard of a model."""
    without_extras = _without_extras(names)
    return any(format.claims(without_extras) for format in FORMATS.values())


def _without_extras(names: Iterable[str]) -> list[str]:
    names = list(names)
    extras = {*find_extras(names)}
    return [name for name in names if name not in extras]


def holds_adapter(name: str | os.PathLike[str]) -> bool:
    """Return whether the files at a path are an adapter rather than a model.

    The names of the tensors decide. The config beside a file counts only if the file has an adapter's usual name: a
    training run may leave a config in the folder of a whole model.

    Raises:
        InputError: they are neither.
    """
    path = resolve(name)
    if is_pipeline(path):
        return False
    with_config = path.is_dir() and (path / CONFIG_NAME).is_file()
    if with_config and any((path / each).is_file() for each in ADAPTER_NAMES):
        return True
    try:
        weights = find_weights(path)
    except InputError:
        if path.is_dir() and not with_config:
            find_adapter_file(path)  # raises the error for a folder without an adapter
        return True
    if weights.suffix == ".json":
        return False
    file = open_weights(weights)
    file.close()
    if is_adapter(file.specs) or is_biases(file.specs) or is_all_lora(file.specs) or is_embeddings(file.specs):
        return True
    return with_config and not _has_ends_of_model(file.specs)


def open_other(name: str | os.PathLike[str]) -> tuple[WeightsFile, dict[str, Any], str, OtherMethod] | None:
    """Open a file of another method than LoRA.

    Returns:
        The weights (the caller closes them), the config's fields, the method's key and the method. None for any other
        file; `open_adapter` opens or refuses that.
    """
    path = resolve(name)
    with reading(path):
        weights = find_adapter_file(path)
    file = open_weights(weights)
    try:
        # files of image models have no config beside them
        without_extras = _without_extras(file.specs)
        image = any(f.claims(without_extras) for f in FORMATS.values() if f.can.components == "many")
        fields = {} if image else find_config(file)[0]
        if other := other_method(file.specs, fields):
            return file, fields, *other
        if is_biases(file.specs) and not image and not _is_complete(weights):
            return file, fields, "BIASES", BIASES
        if not is_adapter(file.specs) and not _is_complete(weights) and is_all_lora(file.specs):
            return file, fields, "UNKNOWN_LORA", UNKNOWN_LORA
        if is_embeddings(file.specs):
            return file, fields, "EMBEDDINGS", EMBEDDINGS
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _has_ends_of_model(specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether the weight of an embedding or a head is among the tensors."""
    roles = (weight_role(module_path(key), len(spec.shape), True) for key, spec in specs.items())
    return any(role in ("embedding", "head") for role in roles)


def _is_complete(weights: Path) -> bool:
    """Return whether a file has PEFT's name and config, so that its tensors' names need no check."""
    return weights.name in WEIGHTS_NAMES and (weights.parent / CONFIG_NAME).is_file()


def open_adapter(
    name: str | os.PathLike[str],
    alpha: float | None = None,
    lenient: bool = False,
    format: str | None = None,
    enabled: Sequence[bool] | None = None,
    model: Mapping[str, Any] | None = None,
    runtime: str = "",
    deeper: bool = False,
) -> Adapter:
    """Open an adapter in any known format: a folder, a file, or a repo id.

    The caller closes the adapter's file.

    Args:
        alpha: for files without an alpha; it must not contradict a stored one.
        lenient: record a module's missing factor, rank or alpha in `UpdateSpec.fault` instead of raising an error.
        format: a key of FORMATS, instead of the first format that claims the names.
        enabled: as `ReadOptions.enabled_slices`.
        model: the base's config.json, for formats whose row order depends on it.
        runtime: a key of PROGRAMS that the adapter is read for; adapters for that runtime alone are accepted.
        deeper: accept an adapter for a model that repeats layers of its base.

    Raises:
        InputError: no format claims the file, its format cannot read it, it is for one runtime alone, or for a deeper
            model.
        NeedsFlag: the file lacks something that an option could give.
        UsageError: `alpha` contradicts the file, or this format has no `enabled`.
    """
    path = resolve(name)
    with reading(path):
        if is_pipeline(path) or any((path / index).is_file() for index in INDEX_NAMES):
            beside = next((each for each in ADAPTER_NAMES if (path / each).is_file()), None)
            if beside is None:
                open_checkpoint(path).close()  # raises an error if it is not a model either
            raise _model_for_adapter(name, beside)
        weights = find_adapter_file(path)
        notes = notes_on_choice(path, weights)
    # messages and reports name the checkpoint that was chosen among several
    called = os.path.join(name, weights.parent.name) if notes and weights.parent != path else os.fspath(name)
    file = open_weights(weights)
    try:
        if is_embeddings(file.specs):
            raise InputError(f"holds {EMBEDDINGS.title}, which {EMBEDDINGS.reason}", culprit=os.fspath(name))
        extras = find_extras(file.specs, file.metadata)
        file.hide(extras)
        claimed = format or next((key for key, each in FORMATS.items() if each.claims(file.specs)), None)
        if enabled and not (claimed and FORMATS[claimed].can.slices):
            theirs = " and ".join(f"{each.key}'s" for each in FORMATS.values() if each.can.slices)
            raise UsageError(f"--enable-lora is for {theirs} files, and this one is {claimed or 'none'}")
        if claimed is None and (weights.parent / CONFIG_NAME).is_file():
            fields, _ = find_config(file)
            claimed = next((key for key, each in FORMATS.items() if each.claims_config(fields)), None)
        if claimed is None and _is_complete(weights):
            claimed = Peft.key  # trained modules or biases and no LoRA
        if claimed:
            options = ReadOptions(alpha, lenient, None if enabled is None else tuple(enabled), model or {})
            adapter = FORMATS[claimed].read(called, file, options)
            only_for = (file.metadata or {}).get(ONLY_FOR, "")
            if only_for and not lenient and only_for != runtime:
                raise InputError(
                    f"is only for {only_for}: the rows or the magnitudes of its tensors are made for that program",
                    culprit=os.fspath(name),
                    remedy="use the adapter that it was converted from",
                )
            if adapter.config.layers and not deeper:
                raise InputError(
                    "is for a model that repeats layers of its base (layer_replication), which only a merge into a "
                    "new model makes",
                    culprit=os.fspath(name),
                    remedy=f"merge it: loratool merge BASE {shell_word(os.fspath(name))} -o MERGED",
                )
            return replace(adapter, extras=extras, notes=(*notes, *adapter.notes), only_for=only_for)
        if is_biases(file.specs):
            raise InputError(
                f"holds {BIASES.title}, which {BIASES.reason}", culprit=os.fspath(name), remedy=BIASES.remedy
            )
        if other := other_method(file.specs, find_config(file)[0]):
            _, method = other
            raise InputError(
                f"holds {method.title}, which {method.reason}", culprit=os.fspath(name), remedy=method.remedy
            )
        if _has_ends_of_model(file.specs):
            raise _model_for_adapter(name)
        first = next(iter(file.specs), "no tensor at all")
        raise InputError(
            f"is not an adapter in a known format ({', '.join(FORMATS)}): it has {first}", culprit=os.fspath(name)
        )
    except BaseException as error:
        file.close()
        if isinstance(error, LoratoolError) and os.fspath(name) not in str(error):
            error.message += f" ({os.fspath(name)})"
        raise


def _model_for_adapter(name: str | os.PathLike[str], beside: str | None = None) -> InputError:
    """Return the error for a model; `beside` is an adapter's file beside its weights, as torchtune leaves one."""
    if beside:
        remedy = f"name the adapter's file: {shell_word(os.path.join(name, beside))}"
        return InputError("holds a model, and an adapter beside it", culprit=os.fspath(name), remedy=remedy)
    return ModelGiven(
        "is a model, not an adapter",
        culprit=os.fspath(name),
        remedy=f"to extract an adapter from a full fine-tune: loratool extract BASE {shell_word(name)}",
    )
