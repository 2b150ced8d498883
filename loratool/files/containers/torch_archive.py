"""Open the output of torch.save, a file or a run of bytes in a file, and locate its tensors.

`torch_pickle` reads the pickle; this module reads the two layouts around it. They are in torch/serialization.py:
`_save` for the zip layout and `_legacy_save` for the one before torch 1.6.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from ...durable.fileio import read_into, reading
from ...errors import InputError
from ..dtypes import DTYPES, TORCH_DTYPES, TensorSpec
from .file_kinds import kind_of_zip
from .torch_pickle import MAX_PICKLE, REMEDY, Machine, SavedTensor, Storage
from .zip_entries import bounded_stream, damage_named, entry_place, is_coded

MAGIC_NUMBER, PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the legacy layout

_Locate = Callable[[Storage], tuple[int, int]]  # a storage's first byte in the run, and its length


class TorchArchive:
    """An object that torch.save wrote; opening reads only the pickle.

    Args:
        path: of the file, for messages.
        begin, nbytes: the range of bytes in the file.
        records: as in `Machine`.

    Raises:
        InputError: it is damaged, or its pickle does more than describe data.
    """

    top: Any  # the saved object, with a `SavedTensor` for each tensor

    def __init__(self, path: Path, file: BinaryIO, begin: int, nbytes: int, records: Collection[str] = ()) -> None:
        self.path, self._file, self._begin, self._nbytes, self._records = path, file, begin, nbytes, records
        with reading(path), damage_named(path):
            stream = bounded_stream(file, begin, nbytes)
            zipped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            self.top, self._locate = self._open_zip(stream) if zipped else self._open_legacy(stream)

    def place(self, name: str, tensor: SavedTensor) -> tuple[TensorSpec, int]:
        """Return a tensor's spec and its first byte in the file.

        Raises:
            InputError: its numbers are not contiguous in the file, or safetensors has no such type.
        """
        dtype = TORCH_DTYPES[tensor.dtype]
        if dtype is None:
            why = f"{self.path.name} stores it as {tensor.dtype}, which safetensors has no name for"
            raise InputError(why, culprit=name, remedy="convert it to another dtype")
        if tensor.lazy or not tensor.contiguous:
            how = "conjugated or negated" if tensor.lazy else f"with strides {tensor.stride} for shape {tensor.shape}"
            why = f"{self.path.name} stores it {how}, not row by row"
            raise InputError(why, culprit=name, remedy="save tensor.resolve_conj().resolve_neg().contiguous() instead")
        spec = TensorSpec(dtype, tensor.shape)
        with damage_named(self.path):
            start, length = self._locate(tensor.storage)
        skip = tensor.offset * DTYPES[dtype] // 8
        if not skip + spec.nbytes <= tensor.storage.nbytes <= length:
            raise InputError(f"{self.path.name} stores less of it than its shape {tensor.shape} needs", culprit=name)
        if start + tensor.storage.nbytes > self._nbytes:
            raise self._refuse(f"is cut off: {name} ends after the end of the file")
        return spec, self._begin + start + skip

    def _refuse(self, why: str, remedy: str | None = None) -> InputError:
        return InputError(why, culprit=str(self.path), remedy=remedy)

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self._nbytes:
            raise ValueError("a part ends after the end of the file")
        buffer = memoryview(bytearray(count))
        read_into(self._file, buffer, self._begin + offset)
        return bytes(buffer)

    def _open_zip(self, stream: io.BufferedReader) -> tuple[Any, _Locate]:
        listed = zipfile.ZipFile(stream).infolist()
        entries = {entry.filename: entry for entry in listed}
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(entries) < len(listed):
            kind = kind_of_zip(entries)
            raise self._refuse(f"is {kind.what}, not one of torch.save", kind.remedy)
        if roots[0] + "constants.pkl" in entries:
            raise self._refuse("is a TorchScript archive, which holds a program beside its weights", REMEDY)

        def locate(name: str) -> tuple[int, int]:
            """Return an entry's first byte and length, from the local header, whose extra field may differ."""
            entry = entries[roots[0] + name]
            if is_coded(entry):
                raise self._refuse(f"holds {name} compressed or encrypted, which torch.save never does", REMEDY)
            return entry_place(entry, self._bytes)

        def content(name: str) -> bytes:
            begin, length = locate(name)
            if length > MAX_PICKLE:
                raise ValueError(f"{name} has {length} bytes")
            return self._bytes(begin, length)

        if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
            raise self._refuse("was saved on a big-endian machine", REMEDY)
        data = content("data.pkl")
        if data.startswith(b"(d"):
            raise self._refuse("was saved in pickle protocol 0, which torch.load does not read either")
        top = Machine(self.path, self._records).run(io.BytesIO(data))
        return top, lambda storage: locate(f"data/{storage.key}")

    def _open_legacy(self, stream: io.BufferedReader) -> tuple[Any, _Locate]:
        """Read the legacy layout: three pickles, the object, the storages' keys, each storage's count and bytes."""
        machine = Machine(self.path, self._records)
        if machine.run(stream) != MAGIC_NUMBER or machine.run(stream) != PROTOCOL_VERSION:
            raise ValueError("another magic number or version")
        if machine.run(stream)["little_endian"] is not True:
            raise self._refuse("was saved on a big-endian machine", REMEDY)
        top, keys = machine.run(stream), machine.run(stream)
        place, places = stream.tell(), {}
        for key in keys:
            storage = machine.storages[key]
            if self._bytes(place, 8) != struct.pack("<q", storage.numel):
                raise ValueError(f"storage {key} has another length than its tensors say")
            places[key] = place + 8, storage.nbytes
            place += 8 + storage.nbytes
        return top, lambda storage: places[storage.key]
