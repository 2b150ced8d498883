"""Hold what of an adapter is written: the tensors, described before any is made, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...files.dtypes import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


# In a file's metadata: the runtime in whose order its rows are, so that everything else would misread it
ONLY_FOR = "loratool_only_for"


@dataclass(frozen=True)
class AdapterContent:
    """An adapter to be written: everything but its bytes, which `load` makes."""

    specs: Mapping[str, TensorSpec]  # name -> type and shape
    load: Callable[[str], Tensor]  # a key of `specs` -> a tensor of exactly that type and shape
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of PEFT's adapter_config.json
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors header; of PEFT's ONLY_FOR alone
    model: Mapping[str, Any] = field(default_factory=dict)  # config.json of the model it is for; empty if not known
    bare: bool = False  # PEFT's names stay without its prefix, as some tools save them
    card: Callable[[], bytes] | None = None  # makes the model card of a folder, once all tensors were made


@dataclass(frozen=True)
class NewModule:
    """Name what a config and metadata say of a module of an image adapter."""

    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...
    rank: int
    alpha: float
    dora: bool
    along_inputs: bool  # DoRA's magnitudes are of the inputs, not of the outputs
    init: str | None  # the initialization that changed its base
