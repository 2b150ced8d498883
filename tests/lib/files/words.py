"""Pack codes into words of 32 bits by whole numbers of Python, apart from loratool, and open what is packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import write_model
from torch import Tensor

from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts


def stream(codes: Sequence[int], bits: int) -> list[int]:
    """The words of a stream of codes, the lowest bit first, as signed integers."""
    whole = sum(code << (at * bits) for at, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [word - (word >> 31 << 32) for word in (whole >> (32 * at) & 0xFFFFFFFF for at in range(count))]


def words(rows: Sequence[Sequence[int]], bits: int) -> Tensor:
    """A stream a row."""
    return torch.tensor([stream(row, bits) for row in rows], dtype=torch.int32)


def signed(word: int) -> int:
    return word - (word >> 31 << 32)


def opened(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Checkpoint:
    """A model of these tensors, opened."""
    quantized = {} if config is None else {"quantization_config": config}
    return open_checkpoint(write_model(folder, tensors, quantized))


def coded(checkpoint: Checkpoint, name: str) -> tuple[CodeFormat, Parts]:
    parts = checkpoint.parts_of(name)
    assert isinstance(parts.weight.codec, CodeFormat)
    return parts.weight.codec, parts


def damaged(tensors: Mapping[str, Tensor], name: str, change: Any) -> dict[str, Tensor]:
    """The tensors without one (None), or with another in its place, or with one number of it changed (a tuple)."""
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    if change is None:
        del changed[name]
    elif isinstance(change, tuple):
        changed[name].view(-1)[change[0]] = change[1]
    else:
        changed[name] = change
    return changed
