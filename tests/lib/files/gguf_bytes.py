"""Write GGUF files as the format's description in llama.cpp has them, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

FLOATS = {"F32": (0, "<f4"), "F16": (1, "<f2"), "BF16": (30, "<u2"), "F64": (28, "<f8")}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, value: Any) -> bytes:
    """A field: a float is f32, an integer u32, a list an array of what its first element is."""
    return text(key) + _value(value)


def _value(value: Any) -> bytes:
    kind, data = typed(value)
    return struct.pack("<I", kind) + data


def typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str | bytes):
        return 8, text(value)
    elements = [typed(each) for each in value]
    kind = elements[0][0] if elements else 8
    return 9, struct.pack("<IQ", kind, len(elements)) + b"".join(data for _, data in elements)


def tensor(kind: int, shape: Sequence[int], data: bytes) -> tuple[int, Sequence[int], bytes]:
    return kind, shape, data


def floats(array: Array, dtype: str = "F32") -> tuple[int, Sequence[int], bytes]:
    """A tensor of a float type; of BF16 the upper halves of the float32, which must be exact."""
    number, code = FLOATS[dtype]
    if dtype == "BF16":
        wide = array.astype("<f4").view("<u4")
        assert not (wide & 0xFFFF).any()
        return number, array.shape, (wide >> 16).astype("<u2").tobytes()
    return number, array.shape, array.astype(code).tobytes()


def gguf(
    fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, Sequence[int], bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file; tensors are (type, shape in torch's order, bytes). `alignment` is a field too if it is not 32."""
    fields = {**fields, **({"general.alignment": alignment} if alignment != 32 else {})}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(entry(key, value) for key, value in fields.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        dims = [*reversed(shape)]
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + data


def write(path: Path, *args: Any, **kwargs: Any) -> Path:
    path.write_bytes(gguf(*args, **kwargs))
    return path
