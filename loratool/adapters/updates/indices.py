"""Read whole numbers that an update's tensors hold: places in a vector, or numbers of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.weights_file import WeightsFile

if TYPE_CHECKING:
    from ...numerics.forms import IntArray

# type in a file -> numpy's
TYPES = {"U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}


def read_indices(file: WeightsFile, name: str, below: int) -> IntArray:
    """Read a tensor of indices from 0 up to, and without, `below`.

    Raises:
        InputError: its type is not of whole numbers, or an index is outside.
    """
    import numpy as np

    spec = file.specs[name]
    if spec.dtype not in TYPES:
        raise InputError(f"has dtype {spec.dtype}, not one of whole numbers", culprit=name)
    indices: IntArray = np.frombuffer(file.read(name), TYPES[spec.dtype]).astype(np.int64).reshape(spec.shape)
    outside = indices[(indices < 0) | (indices >= below)]
    if outside.size:
        raise InputError(f"has the index {outside[0]}, where the indices are 0 to {below - 1}", culprit=name)
    return indices
