"""Write files of llama-imatrix: with gguf-py as imatrix.cpp's save_imatrix does, and in the older form byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Sums = Mapping[str, tuple[npt.ArrayLike, Sequence[float]]]  # tensor -> sums of squares (matrices, in), counts


def write_gguf(path: Path, sums: Sums, **fields: Any) -> Path:
    """Write the form of 2025 and later; `fields` replace those that it has."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "", use_temp_file=False)
    writer.kv_data[0].clear()  # general.architecture, which these files lack
    writer.add_type(fields.get("type", "imatrix"))
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (values, counts) in sorted(sums.items()):
        array = np.asarray(values, dtype=np.float32)
        writer.add_tensor(f"{name}.in_sum2", array)
        writer.add_tensor(f"{name}.counts", np.asarray(counts, dtype=np.float32)[:, None])
        if fields.get("means"):  # of versions since 2026
            writer.add_tensor(f"{name}.in_sum", -array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_binary(path: Path, sums: Sums, tail: bytes = b"") -> Path:
    """Write the older form, in which all counts of a tensor are one number of calls."""
    data = struct.pack("<i", len(sums))
    for name, (values, counts) in sums.items():
        array = np.asarray(values, dtype="<f4").ravel()
        data += struct.pack("<i", len(name.encode())) + name.encode()
        data += struct.pack("<ii", int(counts[0]), array.size) + array.tobytes()
    path.write_bytes(data + tail)
    return path


def tail(dataset: bytes = b"calibration.txt") -> bytes:
    """The chunks and the text that files since April 2024 end with."""
    return struct.pack("<ii", 3, len(dataset)) + dataset
