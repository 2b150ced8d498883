"""Damage vectors of every format at random: what is opened is read and written, or refused with the tensor's name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import spread
from safetensors import safe_open
from safetensors.torch import save_file
from test_vectors import CODED, VECTORS
from torch import Tensor

from loratool import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts
from loratool.files.codecs.scaled import ScaledCodes
from loratool.numerics.code_levels import Integers
from loratool.numerics.tensors import numbers_of

DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (1, 1), (2, 0), (2, 3, 4)]

VALUES = [None, 0, -1, 4, 8, 1e9, True, "", "x", [], [1, 2], {}, {"a": 1}]


def other_shape(draw: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape) or [1]
    at = draw.randrange(len(shape))
    shape[at] = max(0, shape[at] + draw.choice([-1, 1, -shape[at], shape[at]]))
    return torch.zeros(shape).to(tensor.dtype)


def other_bytes(draw: random.Random, tensor: Tensor) -> Tensor:
    changed = tensor.clone().reshape(-1)
    data = changed.view(torch.uint8)
    for _ in range(draw.randrange(1, 4) if len(data) else 0):
        data[draw.randrange(len(data))] = draw.choice([0, 1, 127, 128, 255])
    return changed.reshape(tensor.shape)


DAMAGES: list[Callable[[random.Random, Tensor], Tensor]] = [
    other_shape,
    other_bytes,
    lambda draw, tensor: torch.zeros(tensor.shape).to(draw.choice(DTYPES)),
    lambda draw, tensor: tensor.reshape(-1),
    lambda draw, tensor: tensor.unsqueeze(draw.randrange(tensor.dim() + 1)).contiguous(),
    lambda draw, tensor: torch.zeros(draw.choice(SHAPES)).to(tensor.dtype),
]


def other_config(draw: random.Random, config: Any) -> Any:
    """The config with one of its values changed, at any depth."""
    if not isinstance(config, dict) or not config or draw.random() < 0.2:
        return draw.choice(VALUES)
    key = draw.choice(list(config))
    return {**config, key: other_config(draw, config[key])}


def damaged(draw: random.Random, vector: str, folder: Path) -> Path:
    known = VECTORS[vector]
    with safe_open(CODED / known["file"], "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    config = known["config"]
    for _ in range(draw.randrange(1, 4)):
        name, how = draw.choice(list(tensors)), draw.random()
        if how < 0.2 and len(tensors) > 1:
            del tensors[name]
        elif how < 0.8:
            tensors[name] = draw.choice(DAMAGES)(draw, tensors[name])
        elif config:
            config = {key: other_config(draw, value) for key, value in config.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def use(parts: Parts) -> None:
    """Read a weight, and write it back and anew."""
    codec, (matrices, rows, columns) = parts.weight.codec, parts.shape
    assert isinstance(codec, CodeFormat)
    codec.check(parts)
    codes = codec.codes(parts, 0, matrices * rows)
    values = codec.values(parts, 0, codes)
    assert codes.shape == (matrices * rows, codec.width(parts))
    assert values.shape == (matrices * rows, columns)
    again = codes.copy()
    again[:, :columns] = codec.nearest(parts, 0, values)
    is_number = np.isfinite(values)
    levels = codec.levels(parts) if isinstance(codec, ScaledCodes) else None
    if isinstance(levels, Integers):  # other codes are read, but never chosen
        is_number &= (codes[:, :columns] >= levels.low) & (codes[:, :columns] <= levels.high)
    assert np.array_equal(codec.values(parts, 0, again)[is_number], values[is_number])
    size = parts["codes"].spec.nbytes
    assert all(0 <= first <= size - len(data) for first, data in codec.places(parts, 0, codes))
    quantizer = codec.quantizer(parts)
    if quantizer is not None:
        numbers = numbers_of(torch.linspace(-1, 1, matrices * rows * columns).view(-1, columns).bfloat16())
        if quantizer.sees_all:
            quantizer.see(numbers)
        _, pieces = quantizer.rows(0, numbers)
        sizes = {role: spec.nbytes for role, spec in quantizer.specs().items()}
        assert all(0 <= first <= sizes[role] - len(data) for role, first, data in pieces + quantizer.rest())


def open_and_use(vector: str, seeds: range, folder: Path) -> None:
    for seed in seeds:
        checkpoint = open_checkpoint(damaged(random.Random(seed), vector, folder))
        for name in checkpoint.weights:
            try:
                use(checkpoint.parts_of(name))
            except InputError as error:
                assert any(tensor in str(error) for tensor in checkpoint.weights[name].tensors)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error


@pytest.mark.parametrize("vector", spread(VECTORS, 40))
def test_a_damaged_vector_is_used_or_refused(vector: str, tmp_path: Path) -> None:
    open_and_use(vector, range(6), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("vector", VECTORS)
def test_a_vector_damaged_in_many_ways_is_used_or_refused(vector: str, tmp_path: Path) -> None:
    open_and_use(vector, range(6, 300), tmp_path)
