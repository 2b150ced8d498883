"""Read and write the safetensors header; tensors by offset.

The official library lacks three things: reading blocks of rows into a given buffer, a header that is known before the
first data byte, and bytes that do not depend on the order of a hash map. The format is in huggingface/safetensors,
README.md and safetensors/src/tensor.rs. This reader is stricter in one point: a duplicate name is an error.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...durable.fileio import read_into, size
from ...errors import InputError
from ..dtypes import DATA_ORDER, DTYPES, TensorSpec
from ..weights_file import WeightsFile
from .file_kinds import FIRST, kind_of

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers

LEGACY_HASH = "sshs_legacy_hash"  # of 64 KiB of a file whose header has the keys `ss_*` alone

MAX_HEADER = 100_000_000  # bytes, the official reader's limit

MAX_PARSED = 180_000_000  # bytes of memory, about, for parsed JSON: enough for a header of 150,000 LoRA tensors


class TensorFile(WeightsFile):
    """A safetensors file; opening reads only the header.

    Raises:
        InputError: the file breaks the format.
    """

    def __init__(self, path: Path) -> None:
        self._open(path)
        try:
            self._header = _read_header(self.file, path, self.nbytes)
            specs, begin, metadata = _read_layout(self._header, path, self.nbytes)
            self.specs, self.begin = dict(specs), dict(begin)
            self.metadata = None if metadata is None else dict(metadata)
            self.data_start = 8 + len(self._header)
        except BaseException:
            self.file.close()
            raise

    @property
    def header(self) -> bytes:
        return self._header


def file_metadata(paths: Iterable[Path]) -> dict[str, str]:
    """Return the metadata of the safetensors files among `paths`; later files win."""
    metadata: dict[str, str] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with closing(TensorFile(path)) as file:
                metadata |= file.metadata or {}
    return metadata


@lru_cache(maxsize=1)
def _read_layout(
    header: bytes, path: Path, file_size: int
) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str] | None]:
    """Return specs, first bytes and metadata. The last results are cached, since identifying a file opens it again."""
    entries, metadata = _parse_header(header, path)
    return *_locate(entries, path, 8 + len(header), file_size), metadata


def read_tensor_layout(
    header: bytes, path: Path, nbytes: int | None = None
) -> tuple[dict[str, TensorSpec], dict[str, int], int, dict[str, str]]:
    """Return the specs, each tensor's first byte, the length of the file that begins with this header, its metadata.

    Args:
        header: the JSON without its eight length bytes, from a file that was read as one before.
        path: the name in errors.
        nbytes: the length that the file should have, if it was not.
    """
    entries, metadata = _parse_header(header, path)
    start = 8 + len(header)
    end = nbytes or start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    specs, begin = _locate(entries, path, start, end)
    return specs, begin, end, metadata or {}


def _read_header(file: BinaryIO, path: Path, file_size: int) -> bytes:
    if file_size < 8:
        raise InputError(f"is {file_size} bytes long: not a safetensors file", culprit=str(path))
    prefix = memoryview(bytearray(8))
    read_into(file, prefix, 0)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER or 8 + length > file_size:
        raise InputError(
            f"claims a header of {length} bytes in a file of {file_size}: not a safetensors file, or cut off",
            culprit=str(path),
        )
    header = memoryview(bytearray(length))
    read_into(file, header, 8)
    return bytes(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the name {next(k for k, _ in pairs if k in seen or seen.add(k))!r} stands twice")  # type: ignore[func-returns-value]
    return members


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]}")
    return value


def memory_of(data: bytes) -> int:
    """Return about how much memory parsed JSON takes, from its numbers of members, items, lists and objects."""
    inner = data.count(b"[") + data.count(b"{")
    return 100 * (data.count(b":") + inner) + 40 * data.count(b",") + 2 * (1 if data.isascii() else 4) * len(data)


def parse_json(
    data: bytes, path: Path, finite: bool = False, most: int = MAX_PARSED, halves: bool = False
) -> dict[str, Any]:
    """Parse a JSON object with unique keys; errors name the file `path`.

    Args:
        finite: reject NaN, Infinity and numbers that overflow. Python writes them into configs, but JSON has none.
        most: bytes of memory, as `memory_of` counts.
        halves: accept half of a surrogate pair, which Python writes for a byte of a path that is not UTF-8.
    """
    if memory_of(data) > most:
        raise InputError(f"is JSON that would take more than {size(most)} of memory", culprit=str(path))
    number = _finite if finite else None
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        if kind := kind_of(data[:FIRST]):
            raise InputError(f"is {kind.what}", culprit=str(path), remedy=kind.remedy) from error
        raise InputError(f"is not valid JSON: {error}", culprit=str(path)) from error
    if not isinstance(value, dict):
        raise InputError(f"holds a JSON {type(value).__name__}, not an object", culprit=str(path))
    if not halves and (b"\\ud" in data or b"\\uD" in data):  # JSON allows it, but UTF-8 cannot encode it
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError("holds an escape that is not Unicode text", culprit=str(path)) from error
    return value


def _parse_header(header: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    entries = parse_json(header, path, finite=True)
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
    """Return one object for equal specs: a mixture of experts has tens of thousands of them."""
    return TensorSpec(dtype, shape)


def _locate(
    entries: dict[str, Any], path: Path, data_start: int, file_size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Return the specs and first bytes in file order; raise InputError unless they tile the data section."""
    places = sorted(((*_spec(name, entry, path), name) for name, entry in entries.items()), key=itemgetter(1, 2))
    specs, begin, end = {}, {}, 0
    for spec, start, stop, name in places:
        bits = spec.size * DTYPES[spec.dtype]
        if start != end or (stop - start) * 8 != bits:
            length = f"take {bits // 8} bytes" if bits < 1 << 66 else "take more bytes than any file has"
            raise InputError(
                f"{path.name} puts it at bytes {start}..{stop}; as {spec.dtype} it should start at {end} and {length}",
                culprit=name,
            )
        specs[name], begin[name], end = spec, data_start + start, stop
    if data_start + end != file_size:
        is_cut = data_start + end > file_size
        problem = "cut off" if is_cut else "followed by foreign bytes"
        raise InputError(
            f"is {problem}: the header describes {data_start + end} bytes, the file has {file_size}",
            culprit=str(path),
            remedy="its download or copy did not finish: fetch it again" if is_cut else None,
        )
    return specs, begin


def data_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Sort the names in the official writer's order, which aligns all tensors: widest dtype first, then by name."""
    return sorted(specs, key=lambda name: (DATA_ORDER[specs[name].dtype], name))


def build_header(
    specs: Mapping[str, TensorSpec], names: Iterable[str], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file with `names` in this order, and each tensor's first byte in that file.

    The eight length bytes are included. With at most one metadata key these are the official writer's bytes. More keys
    are sorted here, while the official writer has them in the order of a hash map.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata is not None else {}
    offset, offsets = 0, {}
    for name in names:
        spec, start = specs[name], offset
        offset += spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, offset]}
        offsets[name] = start
    header = _encode_header(entries)
    return header, {name: len(header) + start for name, start in offsets.items()}


def is_hash(key: str) -> bool:
    """Return whether a metadata key has a hash of the tensors, which is wrong after a tensor changes.

    sd-scripts has two (`precalculate_safetensors_hashes`), and Stability's ModelSpec has one for each algorithm.
    """
    return key in ("sshs_model_hash", LEGACY_HASH) or key.startswith("modelspec.hash_")


def edited_header(header: bytes, drop: Iterable[str], add: Mapping[str, str]) -> bytes:
    """Remove and set metadata keys of a header, given without its length bytes and returned with them.

    Everything else keeps its order; if nothing changes, the bytes are the same.
    """
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", None) or {}
    edited = {**{key: value for key, value in metadata.items() if key not in drop}, **add}
    if edited == metadata:
        return with_length(header)
    return _encode_header({"__metadata__": edited, **entries})


def _encode_header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers map the data section, so it must start at a multiple of 8
    split = "split the checkpoint with --max-shard-size"
    if len(text) > MAX_HEADER:
        why = f"the header would be {len(text)} bytes, above the format's limit of {MAX_HEADER}"
        raise InputError(why, remedy=split)
    if memory_of(text) > MAX_PARSED:
        why = f"the header would name {len(entries):,} tensors, and take more memory than is spent on reading it back"
        raise InputError(why, remedy=split)
    return with_length(text)


def with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def tensor_bytes(numbers: Numbers, spec: TensorSpec) -> memoryview:
    """Return the bytes of numbers for a file. Their form and shape must be those of `spec`."""
    from ...numerics.arrays import bytes_of

    assert (numbers.form.name, numbers.shape) == (spec.dtype, spec.shape)
    return bytes_of(numbers.host())
