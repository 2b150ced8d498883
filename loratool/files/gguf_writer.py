"""Build the header of a GGUF file: fields with their types, and where each tensor begins; equal for equal input.

The format is in ggml/src/gguf.cpp and gguf-py/gguf/gguf_writer.py of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from .dtypes import GGML_TYPES, TensorSpec
from .gguf_file import ARRAY, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING

VERSION = 3

# Type of a field's value in Python -> its number in the file; an int is unsigned, of 32 bits
_KINDS = {bool: 7, int: 4, float: 6}

Value = bool | int | float | str | Sequence[int]


def encode_field(key: str, value: Value) -> bytes:
    """Return the entry of a field: key, type and value. A float has 32 bits, an int 32 without sign."""
    name = _text(key)
    if isinstance(value, str):
        return name + struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool | int | float):
        kind = _KINDS[type(value)]
        return name + struct.pack(f"<I{NUMBERS[kind]}", kind, value)
    return name + struct.pack(f"<IIQ{len(value)}I", ARRAY, _KINDS[int], len(value), *value)


def build_header(
    entries: Sequence[bytes], specs: Mapping[str, TensorSpec], alignment: int = DEFAULT_ALIGNMENT
) -> tuple[bytes, dict[str, int], int]:
    """Return all bytes before the first tensor, each tensor's first byte in the file, and the size of the file.

    The tensors are in the order of `specs`, and the last is padded, too.

    Args:
        entries: of the fields, as `encode_field` makes them.
        alignment: of the tensors' first bytes; one that is not the default has to be a field, too.
    """
    header = MAGIC + struct.pack("<IQQ", VERSION, len(specs), len(entries)) + b"".join(entries)
    begin: dict[str, int] = {}
    end = 0
    for name, spec in specs.items():
        begin[name] = end
        number, _, _ = GGML_TYPES[spec.dtype]
        header += _text(name) + struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
        header += struct.pack("<IQ", number, end)
        end = _padded(end + spec.nbytes, alignment)
    start = _padded(len(header), alignment)
    return header.ljust(start, b"\0"), {name: start + first for name, first in begin.items()}, start + end


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
