"""Read the second moments of a model's inputs from a file of llama.cpp's llama-imatrix, GGUF or the older format.

For each tensor NAME of the model a GGUF file has NAME.in_sum2, the sums of the squares of its inputs, (matrices, in),
and NAME.counts, the numbers of inputs. Other tensors (NAME.in_sum) are not used. The older format has for each tensor
the sums and the number of calls to divide by. Since April 2024 the number of chunks and the name of their text follow.
Defined by llama.cpp: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from ..durable.fileio import file_length, open_for_reading, read_into
from ..errors import InputError
from .containers.file_kinds import container_of, first_bytes, kind_of
from .containers.gguf_file import MAGIC, MAX_NAME, MAX_TENSORS, GgufFile
from .hub.cache import resolve

if TYPE_CHECKING:
    from ..numerics.forms import Wide

SUMS, COUNTS = ".in_sum2", ".counts"
GGUF_TYPE = ("general.type", "imatrix")
HOW = "llama-imatrix of llama.cpp writes it: llama-imatrix -m MODEL.gguf -f TEXTS -o imatrix.gguf"


@dataclass(frozen=True)
class _Floats:
    """Some float32 numbers in the file."""

    offset: int  # the first byte
    count: int

    def part(self, first: int, count: int) -> _Floats:
        return _Floats(self.offset + 4 * first, count)


class ImatrixFile:
    """The second moments of the inputs of a model's matrices, by the names of its GGUF tensors.

    Attributes:
        sizes: name -> how many numbers it has, in all matrices of a stack.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        """Open a file and read its list of tensors.

        Raises:
            InputError: the file is missing, is not from llama-imatrix, or is truncated or damaged.
        """
        self.path = resolve(name)
        self._sums: dict[str, _Floats] = {}
        self._counts: dict[str, _Floats | int] = {}  # their place, or in the older format the number
        with ExitStack() as opened:
            if (first := first_bytes(self.path)).startswith(MAGIC):
                gguf = GgufFile(self.path)
                opened.callback(gguf.close)
                self._file = gguf.file
                self._list_gguf(gguf)
            else:
                _require_binary(self.path, first)
                self._file = opened.enter_context(open_for_reading(self.path))
                self._list_binary(self._file)
            if not self._sums:
                raise self._damaged("has no sums of squares")
            self._opened = opened.pop_all()
        self.sizes: Mapping[str, int] = {name: each.count for name, each in self._sums.items()}

    def close(self) -> None:
        self._opened.close()

    @property
    def layers(self) -> int:
        """Return the number of layers in the names."""
        numbers = [int(match[1]) for name in self.sizes if (match := re.match(r"blk\.(\d{1,6})\.", name))]
        return max(numbers, default=-1) + 1

    def matrices(self, name: str, inputs: int) -> int:
        """Return how many matrices with `inputs` inputs a tensor has.

        Raises:
            InputError: it has another number of inputs.
        """
        count, rest = divmod(self.sizes[name], inputs) if inputs else (0, 0)
        if rest or not count:
            has = f"has {self.sizes[name]} inputs in {self.path.name}, and the model's {inputs}"
            raise InputError(f"{has}: it belongs to another model", culprit=name)
        return count

    def moments(self, name: str, inputs: int, first: int, count: int) -> Wide:
        """Return the mean squares of the inputs of `count` matrices of a tensor; nan for a matrix without inputs.

        Args:
            inputs: of each matrix, as in `matrices`.
            first, count: the first matrix, and how many.

        Returns:
            (count, inputs) in float64.

        Raises:
            InputError: a number is negative, nan or infinite, or the counts are of other matrices.
        """
        import numpy as np

        place, matrices = self._counts[name], self.matrices(name, inputs)
        if isinstance(place, int):
            counts = np.array([float(place)])
        elif place.count in (1, matrices):
            counts = self._read(place) if place.count == 1 else self._read(place.part(first, count))
        else:
            has = f"has {place.count} counts in {self.path.name} for {matrices} matrices"
            raise InputError(f"{has}: it belongs to another model", culprit=name)
        values = self._read(self._sums[name].part(first * inputs, count * inputs))
        for numbers in (values, counts):
            if not (np.isfinite(numbers) & (numbers >= 0)).all():
                message = f"has a number in {self.path.name} that is negative or not finite"
                raise InputError(message, culprit=name, remedy=HOW)
        moments: Wide = values.reshape(count, inputs) / np.where(counts == 0, np.nan, counts)[:, None]
        return moments

    def _read(self, place: _Floats) -> Wide:
        import numpy as np

        data = bytearray(4 * place.count)
        read_into(self._file, memoryview(data), place.offset)
        return np.frombuffer(data, "<f4").astype(np.float64)

    def _list_gguf(self, file: GgufFile) -> None:
        key, wanted = GGUF_TYPE
        if (value := file.fields.get(key)) != wanted:
            what = f"is GGUF of the type {value!r}" if value else "is GGUF without a type"
            raise InputError(f"{what}, and llama-imatrix writes {wanted!r}", culprit=str(self.path), remedy=HOW)
        for tensor, spec in file.specs.items():
            name, dot, end = tensor.rpartition(".")
            if dot + end not in (SUMS, COUNTS):
                continue
            if spec.dtype != "F32":
                raise self._damaged(f"has {tensor} as {spec.dtype}, and not F32")
            place = _Floats(file.begin[tensor], spec.size)
            if dot + end == SUMS:
                self._sums[name] = place
            else:
                self._counts[name] = place
        if alone := sorted(self._sums.keys() ^ self._counts.keys()):
            raise self._damaged(f"has only one of {SUMS} and {COUNTS} of {alone[0]}")

    def _list_binary(self, file: BinaryIO) -> None:
        numbers = _Numbers(file, self.path)
        for _ in range(numbers.next()):
            name = numbers.text()
            calls, count = numbers.next(), numbers.next()
            if name in self._sums:
                raise self._damaged(f"has {name} twice")
            if calls < 0 or count < 1:
                raise self._damaged(f"claims {count} numbers of {calls} calls for {name}")
            self._sums[name], self._counts[name] = _Floats(numbers.offset, count), calls
            numbers.skip(4 * count)
        if numbers.left:
            numbers.next()  # how many chunks
        if numbers.left:
            numbers.skip(max(0, numbers.next()))  # of the name of their text
        if numbers.left:
            raise self._damaged(f"has {numbers.left} bytes after its end")

    def _damaged(self, what: str) -> InputError:
        return InputError(what, culprit=str(self.path), remedy=HOW)


def _require_binary(path: Path, first: bytes) -> None:
    """Raise InputError unless the first bytes can be those of the older format; the error names the file's kind."""
    entries, length = struct.unpack("<ii", first[:8]) if len(first) >= 8 else (0, 0)
    if 0 < entries <= MAX_TENSORS and 0 < length <= MAX_NAME:
        return
    kind, container = kind_of(first, path.name), container_of(first)
    what = kind.what if kind else f"a file of {container}" if container else "not a file of llama-imatrix"
    raise InputError(f"is {what}", culprit=str(path), remedy=HOW)


class _Numbers:
    """Reads the older format from front to back."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self.offset = file, path, 0
        self._end = file_length(file)

    @property
    def left(self) -> int:
        return self._end - self.offset

    def skip(self, nbytes: int) -> int:
        """Skip bytes and return where they begin; raise InputError if the file ends before."""
        if nbytes > self.left:
            message = f"is cut off or damaged: {nbytes} bytes should follow byte {self.offset}, and {self.left} do"
            raise InputError(message, culprit=str(self._path), remedy=HOW)
        self.offset += nbytes
        return self.offset - nbytes

    def next(self) -> int:
        """Read an int32."""
        number: int = struct.unpack("<i", self._bytes(4))[0]
        return number

    def text(self) -> str:
        """Read the length of a name, and the name in UTF-8."""
        length = self.next()
        data = self._bytes(length) if 0 < length <= MAX_NAME else b""
        try:
            return data.decode() or _refuse_name(self._path, f"of {length} bytes")
        except UnicodeDecodeError:
            return _refuse_name(self._path, f"that is not UTF-8: {data[:40]!r}")

    def _bytes(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        read_into(self._file, memoryview(data), self.skip(nbytes))
        return bytes(data)


def _refuse_name(path: Path, what: str) -> NoReturn:
    raise InputError(f"has a name {what}: it is damaged", culprit=str(path), remedy=HOW)
