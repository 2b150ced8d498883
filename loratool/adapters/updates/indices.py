"""Read whole numbers that an update's tensors hold: places in a vector or a weight, or numbers of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile

if TYPE_CHECKING:
    from ...numerics.forms import IntArray

# type in a file -> numpy's; PEFT saves SHiRA's as floats on Windows
TYPES = {"U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4"}


def require_integers(spec: TensorSpec, name: str) -> None:
    """Raise InputError for a type that does not hold whole numbers."""
    if spec.dtype not in TYPES:
        raise InputError(f"has dtype {spec.dtype}, not one of whole numbers", culprit=name)


def read_integers(file: WeightsFile, name: str) -> IntArray:
    """Read a tensor of whole numbers, in its shape.

    Raises:
        InputError: its type does not hold them, or one is negative or a fraction.
    """
    import numpy as np

    spec = file.specs[name]
    require_integers(spec, name)
    stored = np.frombuffer(file.read(name), TYPES[spec.dtype]).reshape(spec.shape)
    if not ((stored >= 0) & (stored < 2**62) & (np.floor(stored) == stored)).all():
        raise InputError("holds negative numbers or fractions, which are no places", culprit=name)
    integers: IntArray = stored.astype(np.int64)
    return integers


def read_indices(file: WeightsFile, name: str, below: int) -> IntArray:
    """Read a tensor of indices from 0 up to, and without, `below`.

    Raises:
        InputError: as `read_integers`, or an index is outside.
    """
    indices = read_integers(file, name)
    outside = indices[indices >= below]
    if outside.size:
        raise InputError(f"has the index {outside[0]}, where the indices are 0 to {below - 1}", culprit=name)
    return indices
