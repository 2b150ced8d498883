"""Build a model of four shards, and an adapter that changes two of its matrices, for the tests of outputs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from conftest import factors, weights, write_model, write_peft


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sharded_model(folder: Path) -> Path:
    """Write eight matrices, `a.weight` to `h.weight`, and tensors that no cast may touch."""
    tensors = {f"{n}.weight": weights(6, 4, seed=i, dtype=torch.bfloat16) for i, n in enumerate("abcdefgh")}
    tensors |= {
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
    }
    return write_model(folder, tensors, {"model_type": "llama", "dtype": "bfloat16"}, shards=4)


def write_adapter_of_two(folder: Path) -> Path:
    """Write an adapter of `a.weight` and `b.weight`, which are in two of the model's four shards."""
    return write_peft(folder, {"a": factors(6, 4, 2), "b": factors(6, 4, 2, seed=1)})
