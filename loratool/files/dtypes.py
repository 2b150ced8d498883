"""`TensorSpec(dtype, shape)` and every table of dtypes: safetensors, torch, pickle, options, config."""

from __future__ import annotations

import math
from dataclasses import dataclass

# --dtype of factors -> torch's name
FACTOR_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


# Torch's dtypes with their safetensors names; None where there is none.
TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex32": None, "complex128": None, "float4_e2m1fn_x2": None,
}  # fmt: skip


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


FLOATS = (*TORCH_FLOATS, *FLOAT8)


DTYPE_NAMES = {name: torch_name for torch_name, name in TORCH_DTYPES.items() if name}


SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def with_dtype(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    """Floats of 16 bits or more take it."""
    return TensorSpec(dtype, spec.shape) if dtype and spec.dtype in TORCH_FLOATS else spec


# What --dtype may say -> the safetensors name, None to keep each tensor's own.
MERGE_DTYPES = {
    "keep": None,
    "fp32": "F32",
    "f32": "F32",
    "float32": "F32",
    "float": "F32",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "fp16": "F16",
    "f16": "F16",
    "float16": "F16",
    "half": "F16",
}
