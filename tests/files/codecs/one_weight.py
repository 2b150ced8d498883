"""Store coded weights as a format has them, open them, and write them anew, for the tests of single formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts


def stored(
    folder: Path, tensors: Mapping[str, Tensor], config: Any = None, metadata: dict[str, str] | None = None
) -> Checkpoint:
    """Write a checkpoint and open it."""
    save_file(dict(tensors), folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return open_checkpoint(folder)


def only(checkpoint: Checkpoint) -> Parts:
    """Return a checkpoint's one coded weight."""
    assert not checkpoint.faults
    (name,) = checkpoint.weights
    return checkpoint.parts_of(name)


def codec_of(parts: Parts) -> CodeFormat:
    assert isinstance(parts.weight.codec, CodeFormat)
    return parts.weight.codec


def numbers(parts: Parts, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Decode rows, all of them by default."""
    stop = parts.shape[0] * parts.shape[1] if stop is None else stop
    codec = codec_of(parts)
    return codec.values(parts, start, codec.codes(parts, start, stop))


def written(parts: Parts, rows: Tensor, step: int | None = None) -> dict[str, bytes]:
    """Write a weight anew as `parts` is stored, some rows at a time; bytes by role."""
    codec = codec_of(parts)
    quantizer = codec.quantizer(parts)
    assert quantizer is not None
    found = {role: bytearray(b"\xaa" * spec.nbytes) for role, spec in quantizer.specs().items()}
    pieces = []
    step = step or len(rows)
    assert step >= len(rows) or step % (quantizer.together or 1) == 0
    if quantizer.sees_all:
        quantizer.see(rows)
    for start in range(0, len(rows), step):
        codes, more = quantizer.rows(start, rows[start : start + step])
        pieces += [*more, *(("codes", *place) for place in codec.places(parts, start, codes))]
    for role, first, data in pieces + quantizer.rest():
        found[role][first : first + len(data)] = data
    return {role: bytes(data) for role, data in found.items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
