"""Recognize and open adapters in every known format on disk, each a module and a row of `FORMATS`.

A format answers two questions: whether a file's tensor names are of this format (`claims`), and which adapter the
file holds (`read`). `open_adapter` asks them in the table's order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...errors import InputError, LoratoolError, UsageError
from ...files.checkpoint import INDEX_NAMES, find_weights, is_pipeline, open_weights
from ...files.fileio import reading
from ...files.hub_cache import resolve
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from . import cloneofsimo, diffusers, kohya, loralib, peft
from .find import find_adapter_file
from .other_methods import BIASES, UNKNOWN_LORA, OtherMethod, is_all_lora, is_biases, other_method
from .peft_config import CONFIG_NAME, find_config


@dataclass(frozen=True)
class Format:
    """A format of adapters on disk."""

    claims: Callable[[Iterable[str]], bool]  # tensor names -> whether they are of this format
    read: Callable[[str, WeightsFile, float | None, bool], Adapter]  # (name, file, alpha, lenient) -> adapter


FORMATS = {
    "cloneofsimo": Format(cloneofsimo.claims, cloneofsimo.read),
    "kohya": Format(kohya.claims, kohya.read),
    "diffusers": Format(diffusers.claims, diffusers.read),
    "loralib": Format(loralib.claims, loralib.read),
    "peft": Format(peft.claims, peft.read),
}


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether a format claims the names. None claims biases alone, which can be a shard of a model."""
    names = list(names)
    return any(format.claims(names) for format in FORMATS.values())


def holds_adapter(name: str | os.PathLike[str]) -> bool:
    """Return whether the files at a path are an adapter rather than a model.

    Raises:
        InputError: they are neither.
    """
    found = resolve(name)
    if found.is_dir() and (found / CONFIG_NAME).is_file():
        return True
    if is_pipeline(found):
        return False
    try:
        weights = find_weights(found)
    except InputError:
        if found.is_dir():
            find_adapter_file(found)  # its error says what is wrong with the folder as an adapter
        return True
    if weights.suffix == ".json":
        return False
    file = open_weights(weights)
    file.close()
    return is_adapter(file.specs) or is_biases(file.specs) or is_all_lora(file.specs)


def open_other(name: str | os.PathLike[str]) -> tuple[WeightsFile, dict[str, Any], str, OtherMethod] | None:
    """Open a file of another method than LoRA.

    Returns:
        The weights, which the caller closes, the config's fields, the method's key and the method. None for any other
        file, which `open_adapter` opens or refuses.
    """
    path = resolve(name)
    with reading(path):
        weights = find_adapter_file(path)
    file = open_weights(weights)
    try:
        image = kohya.claims(file.specs) or diffusers.claims(file.specs)  # these formats have no config beside them
        fields = {} if image else find_config(file)[0]
        if other := other_method(file.specs, fields):
            return file, fields, *other
        if is_biases(file.specs) and not image and not _is_complete(weights):
            return file, fields, "BIASES", BIASES
        if not is_adapter(file.specs) and not _is_complete(weights) and is_all_lora(file.specs):
            return file, fields, "UNKNOWN_LORA", UNKNOWN_LORA
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _is_complete(weights: Path) -> bool:
    """Return whether a file has PEFT's name and config, so that its tensors' names need not tell."""
    return weights.name in peft.WEIGHTS_NAMES and (weights.parent / CONFIG_NAME).is_file()


def open_adapter(
    name: str | os.PathLike[str],
    alpha: float | None = None,
    lenient: bool = False,
    format: str | None = None,
    enabled: Sequence[bool] | None = None,
) -> Adapter:
    """Open an adapter in any known format: a folder, a file, or a name in the local Hugging Face cache.

    The caller closes the adapter's file.

    Args:
        alpha: for files that do not say it; it must not contradict one that does.
        lenient: record a module's missing factor, rank or alpha in `UpdateSpec.fault` instead of raising an error.
        format: a key of FORMATS, instead of the first that claims the names.
        enabled: which slices loralib's MergedLinear adapts (`loralib.read`).

    Raises:
        InputError: no format claims the file, or its format cannot read it.
        NeedsFlag: the file does not say what an option could.
        UsageError: `alpha` contradicts the file, or `enabled` is not for this format.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise UsageError(f"--alpha {alpha} is not a finite number")
    path = resolve(name)
    with reading(path):
        if is_pipeline(path) or any((path / index).is_file() for index in INDEX_NAMES):
            raise _model_for_adapter(name)
        weights = find_adapter_file(path)
    file = open_weights(weights)
    try:
        claimed = format or next((key for key, each in FORMATS.items() if each.claims(file.specs)), None)
        if enabled and claimed != "loralib":
            raise UsageError(f"--enable-lora is for loralib's files, and this one is {claimed or 'none'}")
        if claimed == "loralib":
            return loralib.read(os.fspath(name), file, alpha, lenient, enabled)
        if claimed:
            return FORMATS[claimed].read(os.fspath(name), file, alpha, lenient)
        if _is_complete(weights):
            return peft.read(os.fspath(name), file, alpha, lenient)  # trained modules or biases and no LoRA
        if is_biases(file.specs):
            raise InputError(
                f"holds {BIASES.title}, which {BIASES.reason}", culprit=os.fspath(name), remedy=BIASES.remedy
            )
        if other := other_method(file.specs, find_config(file)[0]):
            _, method = other
            raise InputError(
                f"holds {method.title}, which {method.reason}", culprit=os.fspath(name), remedy=method.remedy
            )
        if any(
            weight_role(module_path(key), len(spec.shape), True) in ("embedding", "head")
            for key, spec in file.specs.items()
        ):
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


def _model_for_adapter(name: str | os.PathLike[str]) -> InputError:
    return InputError(
        "is a model, not an adapter",
        culprit=os.fspath(name),
        remedy=f"to make an adapter of a full fine-tune: loratool extract BASE {os.fspath(name)}",
    )
