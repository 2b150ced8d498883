"""`WeightsFile`: the interface that every container of tensors fills (specs, read, rows, scalar)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import InputError
from .dtypes import FLOAT8, TORCH_FLOATS, TensorSpec
from .fileio import open_for_reading, read_into

if TYPE_CHECKING:
    import torch


class WeightsFile:
    """A file of weights behind its header; TensorFile and torchfile.TorchFile each fill these fields.

    `specs` is in the order of the bytes; `begin[name]` is a tensor's first byte in the file. prefix: what stands before
    the names that the file itself has, the folder of a pipeline's component. stamp: which file it was when it was
    opened, and when that had been written to.
    """

    path: Path
    file: BinaryIO
    stamp: tuple[int, ...]
    nbytes: int
    specs: dict[str, TensorSpec]
    begin: dict[str, int]
    metadata: dict[str, str] | None
    ignored: tuple[str, ...] = ()  # what stands beside the weights
    prefix: str = ""

    def _open(self, path: Path) -> None:
        self.path, self.file = path, open_for_reading(path)
        found = os.fstat(self.file.fileno())
        self.stamp, self.nbytes = _stamp(found), found.st_size

    @property
    def place(self) -> str:
        """Its path in the checkpoint's folder."""
        return self.prefix + self.path.name

    def put_under(self, prefix: str) -> None:
        """Name the tensors, which have their own names until then, by their component too."""
        self.prefix = prefix
        self.specs = {prefix + name: spec for name, spec in self.specs.items()}
        self.begin = {prefix + name: begin for name, begin in self.begin.items()}

    def close(self) -> None:
        self.file.close()

    def read(self, name: str) -> memoryview:
        """The bytes of one tensor."""
        buffer = memoryview(bytearray(self.specs[name].nbytes))
        read_into(self.file, buffer, self.begin[name])
        return buffer

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of a type that torch computes with; InputError for the others."""
        import torch

        spec = self.specs[name]
        if spec.dtype not in TORCH_FLOATS:
            raise InputError(f"has dtype {spec.dtype}, not a floating-point type of 16 bits or more", culprit=name)
        dtype = getattr(torch, TORCH_FLOATS[spec.dtype])
        if spec.size == 0:
            return torch.empty(spec.shape, dtype=dtype)
        return torch.frombuffer(self.read(name), dtype=dtype).reshape(spec.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop along the first dimension, the rest flattened: (at most stop - start, columns).

        An 8-bit float comes as float32. InputError for a type that torch does not compute with.
        """
        import torch

        spec = self.specs[name]
        floats = {**TORCH_FLOATS, **FLOAT8}
        if spec.dtype not in floats:
            raise InputError(f"has dtype {spec.dtype}, not a floating-point type", culprit=name)
        stop = min(stop, spec.shape[0])
        columns = spec.size // spec.shape[0] if spec.shape[0] else 0
        out = torch.empty(stop - start, columns, dtype=getattr(torch, floats[spec.dtype]))
        if out.numel():
            view = out.view(torch.uint8).numpy().data.cast("B")
            read_into(self.file, view, self.begin[name] + start * columns * out.itemsize)
        return out.float() if spec.dtype in FLOAT8 else out

    def scalar(self, name: str) -> float:
        """The value of a tensor with one element, without torch (bf16 is the upper half of an fp32)."""
        spec = self.specs[name]
        codes = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
        if spec.size != 1 or (spec.dtype not in codes and spec.dtype != "BF16"):
            raise InputError(f"should be one number, but is {spec}", culprit=name)
        data = bytes(self.read(name))
        return float(
            struct.unpack("<f", b"\0\0" + data)[0]
            if spec.dtype == "BF16"
            else struct.unpack(codes[spec.dtype], data)[0]
        )


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def require_unchanged(files: Iterable[WeightsFile]) -> None:
    """Raises InputError for a file that was written to since it was opened, or in whose place another one is now.

    One that was removed is still whole behind its descriptor, and what was read of it is of one file.
    """
    for each in files:
        found = [os.fstat(each.file.fileno())]
        with suppress(FileNotFoundError):
            found.append(os.stat(each.path))
        if any(_stamp(one) != each.stamp for one in found):
            raise InputError(
                "was written to or replaced while it was read",
                culprit=str(each.path),
                remedy="run the command again when nothing writes there",
            )
