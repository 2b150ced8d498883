"""The content of an adapter to be written: its tensors, described before any is computed, its config and metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...files.dtypes import TensorSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


# Key in a file's metadata: the program whose row order or formula it is for; others would misread it
ONLY_FOR = "loratool_only_for"


@dataclass(frozen=True)
class AdapterContent:
    """An adapter to be written: everything but the tensors' data, which `load` computes."""

    specs: Mapping[str, TensorSpec]  # name -> type and shape
    load: Callable[[str], Numbers]  # a key of `specs` -> numbers of that type and shape
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of PEFT's adapter_config.json
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors header; PEFT's writes only ONLY_FOR
    model: Mapping[str, Any] = field(default_factory=dict)  # config.json of the model it is for; empty if unknown
    bare: bool = False  # PEFT's names are written without its prefix, as some tools save them
    card: Callable[[], bytes] | None = None  # makes the model card of a folder, once all tensors are computed


@dataclass(frozen=True)
class NewModule:
    """A module of an image adapter, as config and metadata describe it."""

    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...
    rank: int
    alpha: float
    dora: bool
    along_inputs: bool  # DoRA's magnitudes are along the inputs, not the outputs
    init: str | None  # the base-mutating initialization
