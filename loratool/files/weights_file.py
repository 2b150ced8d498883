"""`WeightsFile`, the interface of every container of tensors (specs, read, read_numbers, scalar)."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..durable.descriptors import REPLACED, WAIT, kept_open
from ..durable.elsewhere import source_behind
from ..durable.fileio import CHECKED_CHUNK, file_length, open_for_reading, read_into, sampled, write_at
from ..errors import InputError
from .dtypes import TORCH_FLOATS, TensorSpec

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from ..numerics.arrays import Numbers


class WeightsFile:
    """An open weights file with only its header read. A subclass's constructor sets the fields."""

    path: Path
    file: BinaryIO
    stamp: tuple[int, ...]  # device, inode, mtime and size when it was opened
    nbytes: int  # of the file
    specs: dict[str, TensorSpec]  # in the order of the bytes
    begin: dict[str, int]  # tensor -> its first byte in the file
    metadata: dict[str, str] | None  # None if the file has none
    ignored: tuple[str, ...] = ()  # names of everything that a torch file has beside the weights
    file_format: str = "safetensors"  # a key of `output.CONTAINERS`, or the format of a training run's state
    scattered: bool = False  # a tensor's bytes are in several files or places; `read_bytes` concatenates them
    finite: frozenset[str] = frozenset()  # tensors that were read, and found to have no nan and no infinity
    prefix: str = ""  # the folder of a pipeline's component and a slash, before the names in the file

    def _open(self, path: Path) -> None:
        file = open_for_reading(path)
        self.stamp, self.nbytes = _stamp_of(file), file_length(file)
        self.path, self.file = path, kept_open(file, partial(open_for_reading, path))

    def open_again(self, path: Path) -> None:
        """Open another file with the same header and places."""
        self._open(path)

    @property
    def header(self) -> bytes | None:
        """Return the header, from which `layouts.read_layout` gets each tensor's place; None for a torch file."""
        return None

    @property
    def place(self) -> str:
        """Return the file's path relative to the checkpoint's folder."""
        return self.prefix + self.path.name

    def put_under(self, prefix: str) -> None:
        """Add a component's prefix to the tensors' names. Call it once."""
        self.prefix = prefix
        self.specs = {prefix + name: spec for name, spec in self.specs.items()}
        self.begin = {prefix + name: begin for name, begin in self.begin.items()}

    def hide(self, names: Collection[str]) -> None:
        """Remove tensors from `specs` and `begin`, as if the file did not have them. Its header still lists them."""
        self.specs = {name: spec for name, spec in self.specs.items() if name not in names}
        self.begin = {name: begin for name, begin in self.begin.items() if name not in names}

    @property
    def members(self) -> Sequence[WeightsFile]:
        """Return the files on disk that this file consists of."""
        return (self,)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the folders that may have the configs of its content, the nearest first."""
        return (self.path.parent,)

    def storage(self, name: str) -> Hashable:
        """Return a key that is equal for tensors that share their bytes, and for no others of the same spec."""
        return self.begin[name]

    def close(self) -> None:
        self.file.close()

    def stored_type(self, name: str) -> str:
        """Return the stored dtype of a tensor; for a computed tensor, the dtype of its source."""
        return self.specs[name].dtype

    def is_computed(self, name: str) -> bool:
        """Return whether a tensor has no stored bytes to copy, and only `read_numbers` returns it."""
        return False

    def extents(self, name: str) -> Iterator[tuple[BinaryIO, int, int]]:
        """Yield the places of a tensor's bytes in order: (file, first byte, length)."""
        yield self.file, self.begin[name], self.specs[name].nbytes

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes from `first` on."""
        read_into(self.file, out, self.begin[name] + first)

    def read(self, name: str) -> memoryview:
        """Read the bytes of a tensor."""
        buffer = memoryview(bytearray(self.specs[name].nbytes))
        self.read_bytes(name, 0, buffer)
        return buffer

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor; raise InputError unless its dtype is in `TORCH_FLOATS`."""
        from ..numerics.tensors import tensor_of

        return tensor_of(self.numbers(name))

    def numbers(self, name: str) -> Numbers:
        """Read the numbers of a tensor; raise InputError unless its dtype is in `TORCH_FLOATS`."""
        from ..numerics.arrays import Numbers
        from ..numerics.forms import FORMS

        spec = self.specs[name]
        if spec.dtype not in TORCH_FLOATS:
            raise InputError(f"has dtype {spec.dtype}, not a floating-point type of 16 bits or more", culprit=name)
        out = Numbers.empty(FORMS[spec.dtype], *spec.shape)
        if out.size:
            self.read_numbers(name, 0, out.bits)
        return out

    def read_numbers(self, name: str, first: int, out: npt.NDArray[Any]) -> None:
        """Read a tensor's numbers from `first` on into `out`, which is contiguous and of the stored type's width."""
        self.read_bytes(name, first * out.itemsize, out.reshape(-1).view("u1").data)

    def scalar(self, name: str) -> float:
        """Read the value of a tensor with one element, without torch; raise InputError for more elements."""
        spec = self.specs[name]
        formats = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
        if spec.size != 1 or (spec.dtype not in formats and spec.dtype != "BF16"):
            raise InputError(f"should be one number, but is {spec}", culprit=name)
        data = bytes(self.read(name))  # bf16 is the upper half of an fp32
        return float(
            struct.unpack("<f", b"\0\0" + data)[0]
            if spec.dtype == "BF16"
            else struct.unpack(formats[spec.dtype], data)[0]
        )


class PlacedTensors(WeightsFile):
    """Tensors at known places of an open file, whose header is elsewhere or not yet written."""

    def __init__(self, path: Path, file: BinaryIO, specs: dict[str, TensorSpec], begin: dict[str, int]) -> None:
        self.path, self.file, self.specs, self.begin = path, file, specs, begin


def copy_bytes(file: WeightsFile, name: str, first: int, nbytes: int, target: BinaryIO, offset: int) -> int:
    """Copy `nbytes` of a tensor to an offset in a file, through a buffer, and return their CRC-32."""
    buffer, crc = memoryview(bytearray(min(CHECKED_CHUNK, nbytes))), 0
    for done in range(0, nbytes, CHECKED_CHUNK):
        part = buffer[: nbytes - done]
        file.read_bytes(name, first + done, part)
        crc = zlib.crc32(part, crc)
        write_at(target, part, offset + done)
    return crc


def read_parts(file: WeightsFile, name: str, first: int, nbytes: int) -> Iterator[memoryview]:
    """Yield `nbytes` of a tensor from `first` on in parts of 1 MiB; each overwrites the one before."""
    buffer = memoryview(bytearray(min(1 << 20, nbytes)))
    for done in range(0, nbytes, 1 << 20):
        part = buffer[: nbytes - done]
        file.read_bytes(name, first + done, part)
        yield part


def _stamp_of(file: BinaryIO) -> tuple[int, ...]:
    source = source_behind(file)
    return (source.nbytes,) if source else _stamp(os.fstat(file.fileno()))


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def paths_of(files: Iterable[WeightsFile]) -> list[Path]:
    """Return the paths of all files on disk that weights files consist of."""
    return [member.path for file in files for member in file.members]


def require_unchanged(files: Iterable[WeightsFile]) -> None:
    """Raise InputError for a file that was written to or replaced since it was opened.

    A removed file can still be read completely through its descriptor.
    """
    for opened in (member for file in files for member in file.members):
        if source := source_behind(opened.file):
            source.require_same()
            continue
        stamps = [_stamp_of(opened.file)]
        with suppress(FileNotFoundError):
            stamps.append(_stamp(os.stat(opened.path)))
        if any(stamp != opened.stamp for stamp in stamps):
            raise InputError(REPLACED, culprit=str(opened.path), remedy=WAIT)


def _described(file: BinaryIO, path: Path) -> tuple[str, list[Any]]:
    if source := source_behind(file):
        return source.name, [source.identity, source.nbytes]
    return os.path.abspath(path), [*_stamp(os.fstat(file.fileno()))[2:], sampled(file)]


def described_inputs(
    files: Iterable[WeightsFile], configs: Iterable[object], beside: Iterable[Path] = ()
) -> dict[str, list[Any]]:
    """Return `inputs` of a journal's head: time, size and sample of each file, and a hash of the configs.

    Time and size alone would miss a file from an archive that restores times. They would also miss, among torchrun's
    ranks, whose copies may differ in time, a file of another training step with the same size. An edit between the
    sampled pages that keeps time and size is not detected. ctime would show it, but chmod, chown and links change
    ctime too, and Kubernetes does so at each start of a pod: no run could resume.

    Args:
        beside: paths of files that are not weights.
    """
    inputs = dict(_described(each.file, each.path) for file in files for each in file.members)
    for path in beside:
        with open_for_reading(path) as opened:
            inputs |= [_described(opened, path)]
    return {**inputs, "a config": [hashlib.sha256(repr([*configs]).encode()).hexdigest()]}
