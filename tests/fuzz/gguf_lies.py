"""Write GGUF files of a small llama in which any number may lie: counts, lengths, types, dimensions and places."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from lib.files.gguf_bytes import floats, tensor, typed

LIES = (0, 1, 2, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 61, (1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)

Tensors = Mapping[str | bytes, tuple[int, Any, bytes]]  # name -> type, shape in torch's order, bytes

Edit = Callable[[str, int], int]  # what a number is, and the true one -> the one that is written


def fields() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.name": "small",
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.feed_forward_length": 64,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "llama.vocab_size": 8,
        "general.file_type": 0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(8)],
        "tokenizer.ggml.scores": [0.0] * 8,
        "tokenizer.ggml.token_type": [1] * 8,
    }


@cache
def tensors() -> dict[str | bytes, tuple[int, Any, bytes]]:
    """Return all tensors of the model: of F32, F16 and Q8_0."""
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    def blocks(rows: int, columns: int) -> tuple[int, Any, bytes]:
        codes = rng.integers(-127, 128, (rows * columns // 32, 32), np.int8)
        return tensor(8, (rows, columns), b"".join(np.float16(0.004).tobytes() + each.tobytes() for each in codes))

    layer = "blk.0"
    return {
        "token_embd.weight": floats(numbers(8, 32)),
        "output_norm.weight": floats(numbers(32)),
        "output.weight": blocks(8, 32),
        f"{layer}.attn_q.weight": floats(numbers(32, 32)),
        f"{layer}.attn_k.weight": floats(numbers(16, 32), "F16"),
        f"{layer}.attn_v.weight": blocks(16, 32),
        f"{layer}.attn_output.weight": floats(numbers(32, 32)),
        f"{layer}.ffn_gate.weight": floats(numbers(64, 32)),
        f"{layer}.ffn_up.weight": floats(numbers(64, 32)),
        f"{layer}.ffn_down.weight": blocks(32, 64),
        f"{layer}.attn_norm.weight": floats(numbers(32)),
        f"{layer}.ffn_norm.weight": floats(numbers(32)),
    }


def build(
    fields: Mapping[str, Any], tensors: Tensors, edit: Edit = lambda what, number: number, alignment: int = 32
) -> bytes:
    """Return a file, whose every number goes through `edit`; what does not fit a number's type wraps."""

    def put(what: str, number: int, letter: str = "Q") -> bytes:
        size = struct.calcsize(f"<{letter}")
        return (edit(what, number) % (1 << 8 * size)).to_bytes(size, "little")

    def text(what: str, value: str | bytes) -> bytes:
        data = value.encode() if isinstance(value, str) else value
        return put(f"length of a {what}", len(data)) + data

    head = b"GGUF" + put("version", 3, "I") + put("tensors", len(tensors)) + put("fields", len(fields))
    for key, value in fields.items():
        kind, data = typed(value)
        head += text("key", key) + put("type of a value", kind, "I")
        if kind == 8:
            data = text("text", value)
        elif kind == 9:
            inner, count = struct.unpack_from("<IQ", data)
            data = b"".join(text("text", each) for each in value) if inner == 8 else data[12:]
            data = put("type of elements", inner, "I") + put("elements", count) + data
        head += data
    data = b""
    for name, (kind, shape, content) in tensors.items():
        head += text("name", name) + put("dimensions", len(shape), "I")
        head += b"".join(put("dimension", size) for size in reversed(shape))
        head += put("type", kind, "I") + put("place", len(data))
        data += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + data


def one_lie(rng: random.Random, among: int = 115) -> Edit:
    """Return an edit that makes one number another, now and then a second one."""
    at, done = rng.randrange(among), [0]

    def edit(what: str, number: int) -> int:
        done[0] += 1
        if done[0] - 1 != at and rng.random() > 0.004:
            return number
        near = (number + 1, number - 1, number * 2, number + 32, number ^ 8, -number)
        return rng.choice((*LIES, *near, *([rng.randrange(45)] * 8 if "type" in what else ())))

    return edit
