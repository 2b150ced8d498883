"""List the codecs: how files store weights, as tensors of floats or as codes with companions.

A new codec is one file here and one row of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dtypes import TensorSpec
from .codec import Codec, StoredWeight
from .float8 import Float8
from .raw import Raw

RAW = Raw()

# The first that claims a tensor has it; `Raw` has what no other claims.
CODECS: dict[str, Codec] = {codec.key: codec for codec in (Float8(), RAW)}


def find_stored(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, StoredWeight]:
    """Return the weights that names or config tell, by their logical names; the type alone tells the others."""
    found: dict[str, StoredWeight] = {}
    left = dict(specs)
    for codec in CODECS.values():
        claimed = codec.claims(config, left)
        found |= claimed
        for weight in claimed.values():
            for name in weight.tensors:
                del left[name]
    return found


def codec_of(spec: TensorSpec) -> Codec:
    """Return the codec of a tensor that is a weight by itself."""
    return next((codec for codec in CODECS.values() if spec.dtype in codec.dtypes), RAW)
