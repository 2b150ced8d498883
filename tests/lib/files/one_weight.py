"""Store coded weights as a format has them, open them, and write them anew, for the tests of single formats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts, StoredTensor
from loratool.numerics.tensors import numbers_of


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
        quantizer.see(numbers_of(rows))
    for start in range(0, len(rows), step):
        codes, more = quantizer.rows(start, numbers_of(rows[start : start + step]))
        pieces += [*more, *(("codes", *place) for place in codec.places(parts, start, codes))]
    for role, first, data in pieces + quantizer.rest():
        found[role][first : first + len(data)] = data
    return {role: bytes(data) for role, data in found.items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@dataclass(frozen=True)
class Rewritten(StoredTensor):
    """A stored tensor with other bytes."""

    data: bytes = b""

    def read(self, first: int, out: np.ndarray) -> None:
        out.view(np.uint8)[...] = np.frombuffer(self.data, np.uint8)[first * out.itemsize :][: out.nbytes]


def possible_codes(parts: Parts) -> list[int]:
    """Return all codes that a file may have."""
    codec, found = codec_of(parts), []
    for ordinal in range(-256, 256):
        try:
            found.append(int(codec.from_ordinals(parts, np.array([ordinal], np.int16))[0]))
        except IndexError:
            continue
    return found


def hostile(levels: np.ndarray) -> np.ndarray:
    """Return numbers that are hard to encode at each place: far beyond, 0, and all midpoints and what is beside them.

    levels: the numbers of all codes at each place, (codes, rows, columns).
    """
    rising = np.sort(levels, axis=0)
    middles = rising[1:] + (rising[:-1] - rising[1:]) / 2
    far = np.broadcast_to(np.array([0.0, 1e30, -1e30])[:, None, None], (3, *levels.shape[1:]))
    return np.concatenate([far, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])


def rewrite_nearest(parts: Parts, used: set[int]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Put the codes nearest to hostile numbers in the place of half of the codes, until each number was tried.

    Yields the bytes of each try and the numbers that they mean. All codes must come back from the bytes, those of
    neighbors too, and each new one must be the nearest of the `used` ones.
    """
    codec, (matrices, rows, columns) = codec_of(parts), parts.shape
    stored = parts["codes"]
    codes = codec.codes(parts, 0, matrices * rows)
    scaled = codec.with_padding(parts, 0, codes[:, columns:])
    every = [codec.values(scaled, 0, np.full((len(codes), columns), c, codec.code)) for c in possible_codes(parts)]
    levels = np.stack([values for values in every if np.isfinite(values).all()])
    near = np.stack([values for c, values in zip(possible_codes(parts), every, strict=True) if c in used])
    near = near[np.isfinite(near).all(axis=(1, 2))]
    numbers, draw = hostile(levels), np.random.default_rng(0)
    for first in range(0, len(numbers), max(1, codes[:, :columns].size // 2)):
        at = (first + draw.permutation(codes[:, :columns].size).reshape(-1, columns) // 2) % len(numbers)
        goal = np.take_along_axis(numbers, at[None], axis=0)[0]
        made, changed = codes.copy(), draw.random(goal.shape) < 0.5
        made[:, :columns] = np.where(changed, codec.nearest(scaled, 0, goal), codes[:, :columns])
        data = bytearray(bytes(stored.file.read(stored.name)))
        for place, piece in codec.places(parts, 0, made):
            data[place : place + len(piece)] = piece
        again = replace(parts, tensors={**parts.tensors, "codes": Rewritten(stored.file, stored.name, bytes(data))})
        assert np.array_equal(codec.codes(again, 0, matrices * rows), made)
        values = codec.values(again, 0, made)
        apart, least = np.abs(values - goal), np.abs(near - goal).min(axis=0)
        assert (apart <= least * (1 + 2.0**-40))[changed].all()
        yield bytes(data), values
