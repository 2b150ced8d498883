"""Read a NumPy archive (`.npz`) as a `WeightsFile`: a zip with an array in each entry, as mlx and numpy write it.

MLX saved adapters and models so until spring 2024. An entry `<name>.npy` has a header of text, then the numbers, row by
row or column by column. bf16 is `V2`, for which numpy has no other name.
Defined by numpy: `lib/format.py`; ml-explore/mlx: `python/src/load.cpp`, `mlx/io/load.cpp`.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from ...durable.fileio import read_into, reading
from ...errors import InputError
from ..dtypes import TensorSpec
from ..weights_file import WeightsFile
from .file_kinds import NPZ, kind_of_zip
from .torch_pickle import MAX_RANK
from .torch_reader import is_name
from .zip_entries import bounded_stream, damage_named, entry_place, is_coded

END = ".npy"

MAX_HEADER = 10_000  # bytes, numpy's own limit

# numpy's letter and bytes -> safetensors' name
TYPES = {
    "f2": "F16", "f4": "F32", "f8": "F64", "V2": "BF16", "b1": "BOOL", "c8": "C64",
    **{f"i{each // 8}": f"I{each}" for each in (8, 16, 32, 64)},
    **{f"u{each // 8}": f"U{each}" for each in (8, 16, 32, 64)},
}  # fmt: skip

REMEDY = "save its arrays as safetensors: save_file(dict(numpy.load(FILE)), OUT) of safetensors.numpy"


class NpzFile(WeightsFile):
    """A NumPy archive; opening reads the headers of its arrays.

    Raises:
        InputError: it is damaged, compressed, or has an entry that is no array of numbers in little-endian order.
    """

    file_format = NPZ

    def __init__(self, path: Path) -> None:
        self._open(path)
        self.metadata = None
        self._by_columns: set[int] = set()  # the first bytes of arrays
        try:
            with reading(path), damage_named(path, "a NumPy archive"):
                places = sorted(self._places(), key=lambda place: place[2])
            self.specs = {name: spec for name, spec, _ in places}
            self.begin = {name: begin for name, _, begin in places}
        except BaseException:
            self.file.close()
            raise

    def _places(self) -> list[tuple[str, TensorSpec, int]]:
        listed = zipfile.ZipFile(bounded_stream(self.file, 0, self.nbytes)).infolist()
        names = {entry.filename for entry in listed}
        if len(names) < len(listed):
            raise ValueError("two entries have one name")
        places = []
        for entry in listed:
            name = entry.filename.removesuffix(END)
            if name == entry.filename or not is_name(name):
                kind = kind_of_zip([entry.filename])
                raise InputError(f"holds {entry.filename}, and is {kind.what}", culprit=str(self.path), remedy=REMEDY)
            if is_coded(entry):
                raise InputError(f"holds {name} compressed or encrypted", culprit=str(self.path), remedy=REMEDY)
            begin, length = entry_place(entry, self._bytes)
            places.append((name, *self._array(name, begin, length)))
        return places

    def _array(self, name: str, begin: int, length: int) -> tuple[TensorSpec, int]:
        """Return an array's spec, and the first byte of its numbers."""
        first = self._bytes(begin, min(length, 12))
        width = 2 if first[6:7] == b"\x01" else 4
        count = int.from_bytes(first[8 : 8 + width], "little")
        if first[:6] != b"\x93NUMPY" or count > MAX_HEADER:
            raise ValueError(f"{name} has no header of an array")
        header = self._bytes(begin + 8 + width, count).decode("latin-1")
        shape = re.search(r"'shape': *\(([0-9, ]*)\)", header)
        order = re.search(r"'fortran_order': *(True|False)", header)
        if shape is None or order is None:
            raise ValueError(f"{name} has no header of an array")
        kind = re.search(r"'descr': *'[<|=]?(\w+)'", header)
        dtype = TYPES.get(kind[1]) if kind else None
        if dtype is None:
            why = f"{self.path.name} does not store it as numbers in little-endian order"
            raise InputError(why, culprit=name, remedy="convert it to another dtype")
        spec = TensorSpec(dtype, tuple(int(size) for size in shape[1].split(",") if size.strip()))
        if len(spec.shape) > MAX_RANK:
            raise ValueError(f"{name} has {len(spec.shape)} dimensions")
        if 8 + width + count + spec.nbytes != length:
            raise ValueError(f"{name} is longer or shorter than its shape {spec.shape} needs")
        numbers = begin + 8 + width + count
        if order[1] == "True" and len(spec.shape) > 1 and spec.size:
            self._by_columns.add(numbers)
        return spec, numbers

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self.nbytes:
            raise ValueError("a part ends after the end of the file")
        buffer = memoryview(bytearray(count))
        read_into(self.file, buffer, offset)
        return bytes(buffer)

    def is_computed(self, name: str) -> bool:
        return self.begin[name] in self._by_columns

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        if self.begin[name] not in self._by_columns:
            super().read_bytes(name, first, out)
            return
        import numpy as np

        spec = self.specs[name]
        stored = np.frombuffer(self._bytes(self.begin[name], spec.nbytes), f"V{spec.nbytes // spec.size}")
        by_rows = np.ascontiguousarray(stored.reshape(spec.shape, order="F")).tobytes()
        out[:] = by_rows[first : first + len(out)]
