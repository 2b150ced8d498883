"""One safetensors file: its header as `{name: TensorSpec}`, its tensors by offset.

Our own reader and writer, for three things that the official library does not give: blocks of rows read
into a buffer that we own, a header known before the first data byte, and bytes that do not depend on the
order of a hash map. The format is the README of huggingface/safetensors and `safetensors/src/tensor.rs`;
this reader is stricter in one point: a duplicate name is an error.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import InputError
from .fileio import open_for_reading, read_into

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # bytes, the official reader's limit

# Bits an element, in the official enum's order: the reverse of it is the order of a file's data section.
DTYPES = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_RANK = {name: rank for rank, name in enumerate(reversed(DTYPES))}

# The types that a merge can add to, with their names in torch.
TORCH_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Read as the numbers that they are where no scales stand beside them, never written by arithmetic.
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor: a safetensors dtype name and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


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


class TensorFile(WeightsFile):
    """A safetensors file, opened by its header alone. Raises InputError where the file breaks the format."""

    def __init__(self, path: Path) -> None:
        self._open(path)
        try:
            self.header = _read_header(self.file, path, self.nbytes)
            entries, self.metadata = _parse_header(self.header, path)
            self.data_start = 8 + len(self.header)
            self.specs, self.begin = _locate(entries, path, self.data_start, self.nbytes)
        except BaseException:
            self.file.close()
            raise


def read_layout(header: bytes, path: Path) -> tuple[dict[str, TensorSpec], dict[str, int], int]:
    """The specs, first bytes and length of the file that such a header (without its length) begins."""
    entries, _ = _parse_header(header, path)
    start = 8 + len(header)
    end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    specs, begin = _locate(entries, path, start, end)
    return specs, begin, end


def _read_header(file: BinaryIO, path: Path, size: int) -> bytes:
    if size < 8:
        raise InputError(f"is {size} bytes long: not a safetensors file", culprit=str(path))
    prefix = memoryview(bytearray(8))
    read_into(file, prefix, 0)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER or 8 + length > size:
        raise InputError(
            f"claims a header of {length} bytes in a file of {size}: not a safetensors file, or cut off",
            culprit=str(path),
        )
    header = memoryview(bytearray(length))
    read_into(file, header, 8)
    return bytes(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the name {next(k for k, _ in pairs if k in seen or seen.add(k))!r} stands twice")  # type: ignore[func-returns-value]
    return found


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object with unique names; InputError names the file otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON: {error}", culprit=str(path)) from error
    if not isinstance(value, dict):
        raise InputError(f"holds a JSON {type(value).__name__}, not an object", culprit=str(path))
    if b"\\ud" in data.lower():  # half of a surrogate pair is legal in JSON, but no text that could be written again
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError("holds an escape that is not Unicode text", culprit=str(path)) from error
    return value


def _parse_header(header: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    entries = parse_json(header, path)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise InputError("__metadata__ must map strings to strings", culprit=str(path))
    return entries, metadata


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and not [v for v in values if type(v) is not int or not 0 <= v < 1 << 63]


def _spec(name: str, entry: Any, path: Path) -> tuple[TensorSpec, int, int]:
    if not (isinstance(entry, dict) and _are_whole(entry.get("shape")) and _are_whole(entry.get("data_offsets"))):
        raise InputError(f"{path.name} describes it without a whole-number shape and data_offsets", culprit=name)
    offsets = entry["data_offsets"]
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{path.name} gives the unknown dtype {dtype!r}", culprit=name)
    if len(offsets) != 2:
        raise InputError(f"{path.name} gives {len(offsets)} data_offsets instead of 2", culprit=name)
    return _shared_spec(dtype, tuple(entry["shape"])), offsets[0], offsets[1]


@lru_cache(maxsize=1024)
def _shared_spec(dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """One value for all tensors of a kind, of which a mixture of experts has tens of thousands."""
    return TensorSpec(dtype, shape)


def _locate(
    entries: dict[str, Any], path: Path, data_start: int, file_size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Check that the tensors tile the data section without hole or overlap."""
    found = sorted(((*_spec(name, entry, path), name) for name, entry in entries.items()), key=itemgetter(1, 2))
    specs, begin, end = {}, {}, 0
    for spec, start, stop, name in found:
        bits = spec.size * DTYPES[spec.dtype]
        if start != end or (stop - start) * 8 != bits:
            length = f"take {bits // 8} bytes" if bits < 1 << 66 else "take more bytes than any file has"
            raise InputError(
                f"{path.name} puts it at bytes {start}..{stop}; as {spec.dtype} it should start at {end} and {length}",
                culprit=name,
            )
        specs[name], begin[name], end = spec, data_start + start, stop
    if data_start + end != file_size:
        verb = "cut off" if data_start + end > file_size else "followed by foreign bytes"
        raise InputError(
            f"is {verb}: the header describes {data_start + end} bytes, the file has {file_size}", culprit=str(path)
        )
    return specs, begin


def data_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The official writer's order: widest dtype first (reverse enum), then by name, so that all is aligned."""
    return sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))


def build_header(
    specs: Mapping[str, TensorSpec], names: Iterable[str], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds `names` in this order, and each tensor's first byte in that file.

    The length prefix is included. With at most one metadata key these are the official writer's bytes;
    with more, ours are sorted where the official ones come in the order of a hash map.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata is not None else {}
    offset, offsets = 0, {}
    for name in names:
        spec = specs[name]
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offsets[name], offset = offset, offset + spec.nbytes
    header = _encode_header(entries)
    return header, {name: len(header) + start for name, start in offsets.items()}


def edit_metadata(header: bytes, drop: Iterable[str], add: Mapping[str, str]) -> bytes:
    """A header, given without its length prefix and returned with it, with metadata keys dropped and set.

    All else and its order are kept; where nothing changes, these are the same bytes.
    """
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", None) or {}
    edited = {**{key: value for key, value in metadata.items() if key not in drop}, **add}
    if edited == metadata:
        return with_length(header)
    return _encode_header({"__metadata__": edited, **entries})


def _encode_header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers map the data section, so it starts at a multiple of 8
    if len(text) > MAX_HEADER:
        raise InputError(
            f"the header would be {len(text)} bytes, above the format's limit of {MAX_HEADER}",
            remedy="split the checkpoint with --max-shard-size",
        )
    return with_length(text)


def with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header
