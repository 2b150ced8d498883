"""All tables of dtypes (safetensors, torch, pickle, ggml, options, config), and `TensorSpec(dtype, shape)`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# torch's name -> safetensors' name, None where safetensors has none. The other tables are views of this one.
TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex32": None, "complex128": None, "float4_e2m1fn_x2": None,
}  # fmt: skip

DTYPE_NAMES = {name: torch_name for torch_name, name in TORCH_DTYPES.items() if name}

# Bits per element, in the order of `Dtype` in safetensors/src/tensor.rs: a file's data section has the reverse order.
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

# ggml's name -> its number in a GGUF file, and the numbers and bytes of a block. Blocks run along the last dimension.
# The types of 1 number a block are those of DTYPES (ggml/include/ggml.h and ggml/src/ggml-common.h of llama.cpp).
GGML_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "F64": (28, 1, 8), "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 36), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56),
    "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}  # fmt: skip

# A type of several numbers a block -> the block's numbers and bytes
BLOCK_TYPES = {name: (numbers, nbytes) for name, (_, numbers, nbytes) in GGML_TYPES.items() if numbers > 1}

DATA_ORDER = {name: place for place, name in enumerate(reversed(DTYPES))}

# The types of 16 bits or more, which --dtype casts -> torch's name
TORCH_FLOATS = {name: DTYPE_NAMES[name] for name in ("F16", "BF16", "F32", "F64")}

# Numbers where no scale is beside them; no other type is cast to them -> torch's name
FLOAT8 = {name: DTYPE_NAMES[name] for name in ("F8_E4M3", "F8_E5M2")}

# The types that a merge can add to
FLOATS = (*TORCH_FLOATS, *FLOAT8)

# torch's name -> safetensors' name, of `TORCH_FLOATS`
SAFETENSORS = {torch_name: name for name, torch_name in TORCH_FLOATS.items()}

CONFIG_DTYPES = SAFETENSORS  # `dtype` or `torch_dtype` of a config.json

# --dtype of factors -> safetensors' name
FACTOR_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

# --dtype of weights -> safetensors' name, None to keep each tensor's dtype. An error message lists the keys in order.
MERGE_DTYPES = {
    "keep": None,
    **dict.fromkeys(("fp32", "f32", "float32", "float"), "F32"),
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
    **dict.fromkeys(("fp16", "f16", "float16", "half"), "F16"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype and shape, from a file's header."""

    dtype: str  # a key of DTYPES or BLOCK_TYPES
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        if self.dtype in BLOCK_TYPES:
            numbers, nbytes = BLOCK_TYPES[self.dtype]
            return self.size // numbers * nbytes
        return self.size * DTYPES[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def with_dtype(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    """Return the spec with `dtype`; unchanged if `dtype` is None or the tensor is not a float of 16 bits or more."""
    return TensorSpec(dtype, spec.shape) if dtype and spec.dtype in TORCH_FLOATS else spec


def dtypes_of(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """Return the dtypes of tensors that are not scalars, the commonest first."""
    return tuple(dtype for dtype, _ in Counter(spec.dtype for spec in specs if spec.shape).most_common())
