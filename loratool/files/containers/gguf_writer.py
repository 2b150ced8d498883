"""Plan a GGUF file that is written from another: its header and each tensor's place, before the first byte.

Fields keep their bytes and their order, except those that would be wrong in the output. The layout is that of
gguf_write_to_buf in ggml/src/gguf.cpp of llama.cpp: tensors follow each other, each padded to the alignment.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import InputError
from ..dtypes import BLOCK_TYPES, GGML_TYPES, TensorSpec
from .gguf_file import ARRAY, MAGIC, NUMBERS, STRING, GgufFile

FILE_TYPE, PROVENANCE = "general.file_type", "loratool"

SPLIT = {"split.no": "H", "split.count": "H", "split.tensors.count": "i"}  # of a part, and struct's letters

# ggml type -> file type of a model with nearly all matrices in it (llama.h, llama_ftype), for types that a merge writes
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}

CODED_VERSION = {"general.quantization_version": 2}  # a field of each model with block types (GGML_QNT_VERSION)

VALUE_TYPES = "?IiQqfd"  # candidates for a number without a given type; the first that holds it is used

KINDS = {letter: kind for kind, letter in NUMBERS.items()}


def text_field(key: str, value: str) -> bytes:
    return _text(key) + struct.pack("<I", STRING) + _text(value)


def number_field(key: str, letter: str, value: int | float) -> bytes:
    return _text(key) + struct.pack(f"<I{letter}", KINDS[letter], value)


def value_field(key: str, value: Any) -> bytes:
    """Return the entry of a text, a bool, a number or a sequence of one of these, in the first type that holds it.

    Raises:
        InputError: no type holds it.
    """
    is_array = not isinstance(value, bool | int | float | str)
    items = [*value] if is_array else [value]
    fitting = (each for each in VALUE_TYPES if all(_holds(each, item) for item in items))
    letter = next(fitting, None) if items else None
    if letter is None and not all(isinstance(item, str) for item in items):
        raise InputError(f"is {str(value)[:80]}, for which GGUF has no type", culprit=key)
    kind = STRING if letter is None else KINDS[letter]
    data = b"".join(_text(item) if letter is None else struct.pack(f"<{letter}", item) for item in items)
    types = struct.pack("<IIQ", ARRAY, kind, len(items)) if is_array else struct.pack("<I", kind)
    return _text(key) + types + data


def _holds(letter: str, value: Any) -> bool:
    """Return whether a type of `struct` holds a value exactly."""
    if type(value) is not {"?": bool, "f": float, "d": float}.get(letter, int):
        return False
    try:
        (stored,) = struct.unpack(f"<{letter}", struct.pack(f"<{letter}", value))
    except (struct.error, OverflowError):
        return False
    return stored == value or value != value  # true for nan


def split_fields(number: int, count: int, tensors: int) -> dict[str, bytes]:
    """Return the split's entries for part `number`, counted from 0; none if there is only one part."""
    values = zip(SPLIT.items(), (number, count, tensors), strict=True)
    return {key: number_field(key, letter, value) for (key, letter), value in values} if count > 1 else {}


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def kept_fields(source: GgufFile, changed: Mapping[str, bytes], without: Iterable[str] = ()) -> list[bytes]:
    """Return the entries of a file's fields in their order, with some replaced, added or removed.

    Args:
        changed: key -> its new entry; new keys come last.
        without: keys to remove.
    """
    gone = frozenset(without)
    entries = [changed.get(key) or source.entry(key) for key in source.places if key not in gone]
    return entries + [entry for key, entry in changed.items() if key not in source.places]


def type_fields(
    source: GgufFile, before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec]
) -> dict[str, bytes]:
    """Return new entries of the fields that describe types, if the type of most numbers in matrices has changed."""
    most, fields = _most(after), dict[str, int]()
    if FILE_TYPE in source.fields and most in FILE_TYPES and most != _most(before):
        fields[FILE_TYPE] = FILE_TYPES[most]
    if any(spec.dtype in BLOCK_TYPES for spec in after.values()):
        fields |= {key: value for key, value in CODED_VERSION.items() if key not in source.fields}
    return {key: number_field(key, "I", value) for key, value in fields.items()}


def _most(specs: Mapping[str, TensorSpec]) -> str:
    sizes: Counter[str] = Counter()
    for spec in specs.values():
        if len(spec.shape) > 1:
            sizes[spec.dtype] += spec.size
    return max(sizes, key=lambda dtype: sizes[dtype], default="")


def build_gguf(
    fields: list[bytes], specs: Mapping[str, TensorSpec], alignment: int, version: int
) -> tuple[bytes, dict[str, int], int]:
    """Return all bytes before the first tensor, each tensor's first byte in the file, and the file's length.

    Args:
        specs: in the order of the output.

    Raises:
        InputError: ggml does not have a tensor's type.
    """
    infos, offsets, end = [], {}, 0
    for name, spec in specs.items():
        if spec.dtype not in GGML_TYPES:
            raise InputError(f"is {spec.dtype}, which GGUF files cannot store", culprit=name, remedy="add --dtype f16")
        dims = spec.shape[::-1]
        infos.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, GGML_TYPES[spec.dtype][0], end))
        offsets[name] = end
        end = _padded(end + spec.nbytes, alignment)
    head = MAGIC + struct.pack("<IQQ", version, len(infos), len(fields)) + b"".join(fields) + b"".join(infos)
    head += bytes(_padded(len(head), alignment) - len(head))
    return head, {name: len(head) + offset for name, offset in offsets.items()}, len(head) + end


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
