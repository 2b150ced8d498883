"""Read a torch file (`.bin`, `.pt`, `.pth`, `.ckpt`) behind the interface of `WeightsFile`, without torch.

`torch_pickle` reads the file's pickle; the two layouts around it are read here. The formats are in
torch/serialization.py, `_save` for the zip layout and `_legacy_save` for the one before torch 1.6.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, LoratoolError
from .dtypes import DTYPES, TORCH_DTYPES, TensorSpec
from .fileio import read_into, reading
from .torch_pickle import MAX_PICKLE, REMEDY, Machine, SavedTensor, Storage
from .weights_file import WeightsFile

MAGIC_NUMBER, PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the legacy layout

# Where training tools save the weights in a larger dict; the first that has tensors counts.
STATE_DICT_KEYS = ("state_dict", "model", "module", "model_state_dict", "params", "params_ema", "ema")


class _Bounded(io.BufferedReader):
    """A stream whose reads never allocate more than a header needs, whatever length the file claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_PICKLE:
            raise ValueError(f"a header with one part of {size} bytes")
        return super().read(1 << 17 if size is None or size < 0 else size)  # zipfile reads the archive's end so

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(MAX_PICKLE)


_Locate = Callable[[Storage], tuple[int, int]]  # a storage's first byte in the file, and its length


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn every error of the block into an InputError that names the file: a damaged file can fail in any way."""
    try:
        yield
    except (LoratoolError, OSError):
        raise
    except Exception as error:
        why = (str(error) or type(error).__name__)[:200]
        raise InputError(f"is damaged, cut off or not a file of torch.save: {why}", culprit=str(path)) from error


class TorchFile(WeightsFile):
    """A torch file, of which opening reads only the pickle.

    The weights are the dict that was saved or, if it has no tensors itself, the first value in it under one of
    `STATE_DICT_KEYS` that has. Tied weights are under each of their names, with equal `begin` and spec. `ignored`
    names all else.

    Raises:
        InputError: the file has something else than plain weights.
    """

    def __init__(self, path: Path) -> None:
        self._open(path)
        self.metadata = None
        try:
            with reading(path), _damage_named(path):
                stream = _Bounded(self.file)  # type: ignore[arg-type]
                try:
                    zipped = stream.read(4) == b"PK\x03\x04"
                    stream.seek(0)
                    top, locate = self._open_zip(stream) if zipped else self._open_legacy(stream)
                finally:
                    stream.detach()
                tensors, self.ignored = self._choose(top)
                found = [(self._place(name, tensor, locate), name) for name, tensor in tensors.items()]
                found.sort(key=lambda item: (item[0][1], item[1]))
                self.specs = {name: spec for (spec, _), name in found}
                self.begin = {name: begin for (_, begin), name in found}
        except BaseException:
            self.file.close()
            raise

    def _refuse(self, why: str, remedy: str | None = None) -> InputError:
        return InputError(why, culprit=str(self.path), remedy=remedy)

    def _bytes(self, offset: int, count: int) -> bytes:
        buffer = memoryview(bytearray(count))
        read_into(self.file, buffer, offset)
        return bytes(buffer)

    def _open_zip(self, stream: io.BufferedReader) -> tuple[Any, _Locate]:
        listed = zipfile.ZipFile(stream).infolist()
        entries = {entry.filename: entry for entry in listed}
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(entries) < len(listed):
            raise self._refuse("is a zip file, but not one of torch.save")
        if roots[0] + "constants.pkl" in entries:
            raise self._refuse("is a TorchScript archive, which holds a program beside its weights", REMEDY)

        def locate(name: str) -> tuple[int, int]:
            """Return an entry's first byte and length, from its local header, whose extra field may differ."""
            entry = entries[roots[0] + name]
            if entry.compress_type or entry.flag_bits & 1:
                raise self._refuse(f"holds {name} compressed or encrypted, which torch.save never does", REMEDY)
            header = self._bytes(entry.header_offset, 30)
            if header[:4] != b"PK\x03\x04" or entry.compress_size != entry.file_size or entry.external_attr & 16:
                raise ValueError(f"{name} is not where the list of entries puts it, has two lengths or is a folder")
            return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])), entry.file_size

        def content(name: str) -> bytes:
            begin, length = locate(name)
            if length > MAX_PICKLE:
                raise ValueError(f"{name} has {length} bytes")
            return self._bytes(begin, length)

        if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
            raise self._refuse("was saved on a big-endian machine", REMEDY)
        top = Machine(self.path).run(io.BytesIO(content("data.pkl")))
        return top, lambda storage: locate(f"data/{storage.key}")

    def _open_legacy(self, stream: io.BufferedReader) -> tuple[Any, _Locate]:
        """Read the legacy layout: preamble of three pickles, object, storages' keys, each storage's count and bytes."""
        machine = Machine(self.path)
        if machine.run(stream) != MAGIC_NUMBER or machine.run(stream) != PROTOCOL_VERSION:
            raise ValueError("another magic number or version")
        if machine.run(stream)["little_endian"] is not True:
            raise self._refuse("was saved on a big-endian machine", REMEDY)
        top, keys = machine.run(stream), machine.run(stream)
        at, places = stream.tell(), {}
        for key in keys:
            storage = machine.storages[key]
            if self._bytes(at, 8) != struct.pack("<q", storage.numel):
                raise ValueError(f"storage {key} has another length than its tensors say")
            places[key] = at + 8, storage.nbytes
            at += 8 + storage.nbytes
        return top, lambda storage: places[storage.key]

    def _choose(self, top: Any) -> tuple[dict[str, SavedTensor], tuple[str, ...]]:
        """Return the dict of weights in the saved object, and the names of all else."""

        def tensors(value: Any) -> dict[Any, SavedTensor]:
            return {k: v for k, v in value.items() if type(v) is SavedTensor} if type(value) is dict else {}

        if type(top) is not dict:
            raise self._refuse(f"holds a {type(top).__name__.strip('_').lower()}, not a dict of tensors", REMEDY)
        inner = next((key for key in STATE_DICT_KEYS if tensors(top.get(key))), None)
        found = tensors(top[inner] if inner else top)
        if inner and tensors(top):
            raise self._refuse(f"holds tensors both at its top and in {inner}: which are the weights?", REMEDY)
        if not found:
            raise self._refuse(
                f"holds no tensors, neither at its top nor in one of {', '.join(STATE_DICT_KEYS)}", REMEDY
            )
        for name in found:
            if type(name) is not str or name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
                raise self._refuse("has a tensor whose name is no text, or is reserved", REMEDY)
        beside = [key for key in top if key != inner and (inner or key not in found)]
        beside += [f"{inner}.{key}" for key in top[inner] if key not in found] if inner else []
        return found, tuple(key if type(key) is str else "?" for key in beside)

    def _place(self, name: str, tensor: SavedTensor, locate: _Locate) -> tuple[TensorSpec, int]:
        dtype = TORCH_DTYPES[tensor.dtype]
        if dtype is None:
            why = f"{self.path.name} stores it as {tensor.dtype}, which safetensors has no name for"
            raise InputError(why, culprit=name, remedy="convert it to another dtype")
        if tensor.lazy or not tensor.contiguous:
            how = "conjugated or negated" if tensor.lazy else f"with strides {tensor.stride} for shape {tensor.shape}"
            why = f"{self.path.name} stores it {how}, not row by row"
            raise InputError(why, culprit=name, remedy="save tensor.resolve_conj().resolve_neg().contiguous() instead")
        spec = TensorSpec(dtype, tensor.shape)
        start, length = locate(tensor.storage)
        skip = tensor.offset * DTYPES[dtype] // 8
        if not skip + spec.nbytes <= tensor.storage.nbytes <= length:
            raise InputError(f"{self.path.name} stores less of it than its shape {tensor.shape} needs", culprit=name)
        if start + tensor.storage.nbytes > self.nbytes:
            raise self._refuse(f"is cut off: {name} ends behind its end")
        return spec, start + skip
