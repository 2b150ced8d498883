"""Hold reads of one weight: any rows of any codec, norms where squares overflow or vanish, what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights, write_model
from lib.files.gguf_bytes import tensor, write
from safetensors.torch import save_file
from torch import Tensor

from loratool.errors import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.containers.virtual import VirtualFile
from loratool.files.tensor_ref import (
    TensorRef,
    finite_norm,
    known_finite,
    read_float32,
    require_finite,
    squared_norm,
)
from loratool.numerics.arrays import ON_CPU, Numbers
from loratool.numerics.forms import F64
from loratool.numerics.tensors import numbers_of, tensor_of

NAN, INF = float("nan"), float("inf")


def model(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    return open_checkpoint(write_model(folder, tensors, {}))


def with_one(x: Tensor, value: float) -> Tensor:
    found = x.clone()
    found.view(-1)[x.numel() // 2] = value
    return found


@pytest.mark.parametrize("shape", [(12,), (6, 4), (3, 4, 5)])
def test_a_part_is_rows_of_the_matrix(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    ref, flat = model(tmp_path, {"x": x}).ref("x"), x.view(-1, *shape[1:][-1:])
    part = ref.part(2, 5)
    assert part.spec.shape == tuple(flat[2:5].shape) and torch.equal(part.tensor(), flat[2:5])
    assert torch.equal(part.part(1, 2).tensor(), flat[3:4]) and part.full_spec == ref.spec
    rows = ref.read_matrix(shape[0], 1, 99).reshape(*x[1:].shape)
    assert ref.read_matrix(shape[0], 1, 1).size == 0 and torch.equal(tensor_of(rows), x[1:])


def test_blocks_are_the_tensor(tmp_path: Path) -> None:
    """A row is one of the first dimension, and of large matrices one of theirs; one number is a row too."""
    x = weights(3, 4, 5)
    m = model(tmp_path, {"x": x, "one": torch.tensor(2.0)})
    for most, rows, columns in ((1000, 3, 20), (20, 3, 20), (19, 12, 5), (1, 12, 5)):
        found = list(map(tensor_of, m.ref("x").blocks(most)))
        assert torch.equal(torch.cat(found), x.view(rows, columns))
        assert all(len(each) == max(1, most // columns) for each in found[:-1])
    assert [each.wide().tolist() for each in m.ref("one").blocks(7)] == [[[2.0]]]


def test_pieces_of_rows_that_are_decoded_whole(tmp_path: Path) -> None:
    """Rows of 64 numbers, of which 8 or 24 at a time are asked for: they begin and end within a row."""
    draw = np.random.default_rng(0)
    codes, scales = draw.integers(-128, 128, (6, 2, 32)).astype("i1"), draw.uniform(0.01, 0.1, (6, 2)).astype("f2")
    blocks = b"".join(scales[i].tobytes() + codes[i].tobytes() for i in np.ndindex(6, 2))
    path = write(tmp_path / "x.gguf", {"general.architecture": "x"}, {"w.weight": tensor(8, (6, 64), blocks)})
    ref = open_checkpoint(path).ref("w.weight")
    exact = (codes.astype("f8") * scales.astype("f8")[:, :, None]).reshape(-1)
    for columns in (8, 24, 64, 128):
        rows = exact.reshape(-1, columns)
        for start in range(len(rows)):
            out = Numbers.empty(F64, len(rows) - start, columns)
            ref.read(start, out)
            assert np.array_equal(out.wide(), rows[start:])
    assert np.array_equal(ref.read_matrix(6, 1, 3).wide(), exact.reshape(6, 64)[1:3])


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200])
@pytest.mark.parametrize("size", [5, (1 << 20) + 3])
def test_norms_are_those_of_numpy_where_squares_fit(scale: float, size: int) -> None:
    x = torch.linspace(-3, 2, size, dtype=torch.float64)
    assert finite_norm(numbers_of(x * scale)) == pytest.approx(float(np.linalg.norm(x.numpy())) * scale, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_are_over_finite_numbers(dtype: torch.dtype) -> None:
    x = torch.tensor([3.0, NAN, INF, -4.0, -INF], dtype=dtype)
    zeros, nans = torch.zeros(3, dtype=dtype), torch.full((2,), NAN)
    assert [finite_norm(numbers_of(each)) for each in (x, zeros, nans)] == [5.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_what_is_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    x = weights(5, 7)
    m = model(tmp_path, {"x": x.to(dtype), "y": with_one(x, value).to(dtype)})
    assert [numbers_of(each.to(dtype)).all_finite() for each in (x, with_one(x, value))] == [True, False]
    require_finite(m.stored_ref("x"))
    with pytest.raises(InputError, match="holds nan or inf") as refused:
        require_finite(m.stored_ref("y"))
    assert refused.value.culprit == "y"


def test_what_has_no_rows_of_floats_is_finite(tmp_path: Path) -> None:
    m = model(tmp_path, {"ints": torch.arange(3), "none": torch.empty(0, 3), "one": torch.tensor(NAN)})
    for name in m:
        require_finite(m.ref(name))
        assert squared_norm(m.ref(name)) == 0.0
    assert numbers_of(torch.empty(0)).all_finite()


def test_known_finite_reads_neighbours_at_once_and_knows_them_apart(tmp_path: Path) -> None:
    """One that is not finite takes its run with it, never another type's; a large one, or of codes, is in none."""
    big = torch.zeros(600, 1024)
    tensors = {
        "a": weights(3), "b": weights(4), "c": with_one(weights(5), NAN),
        "d": weights(3).half(), "e": weights(4).half(), "f": torch.arange(3), "g": torch.empty(0), "zbig": big,
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    file = open_checkpoint(tmp_path / "x.safetensors").shards[0]
    assert known_finite(file, tensors) == {"d", "e"}
    assert known_finite(file, [name for name in tensors if name != "c"]) == {"a", "b", "d", "e"}
    assert known_finite(file, ["b"]) == {"b"} and known_finite(file, []) == set()
    # in the file a lies before b before c: without b they do not adjoin, and c is alone
    assert known_finite(file, ["a", "c"]) == {"a"}
    computed = VirtualFile(file, file.specs, lambda name: numbers_of(tensors[name]), {})
    assert known_finite(computed, tensors) == set()


def test_runs_end_at_a_million_bytes(tmp_path: Path) -> None:
    tensors = {f"{i}": torch.full((100, 1000), float(i)) for i in range(9)}
    tensors["8"][0, 0] = INF
    save_file(tensors, tmp_path / "x.safetensors")
    file = open_checkpoint(tmp_path / "x.safetensors").shards[0]
    assert known_finite(file, tensors) == {"0", "1", "2", "3", "4", "5"}


def test_squared_norms_are_those_of_all_blocks(tmp_path: Path) -> None:
    x = torch.ones(3, 1 << 20).half() / 2
    assert squared_norm(model(tmp_path, {"x": x}).ref("x")) == 3 * (1 << 20) / 4


def test_float32_of_what_it_can_not_hold(tmp_path: Path) -> None:
    x = weights(3, 4, dtype=torch.float64)
    m = model(tmp_path, {"x": x, "stack": weights(2, 3, 4), "nan": with_one(x, NAN), "huge": with_one(x, 1e39)})
    for like in (ON_CPU, torch.empty(0)):  # on torch's tensors as on a GPU
        found = read_float32(m.ref("x"), like)
        assert type(found) is type(like) and str(found.dtype).endswith("float32") and np.array_equal(found, x.float())
        assert np.array_equal(read_float32(m.ref("stack"), like), weights(2, 3, 4))
        for name in ("nan", "huge"):
            with pytest.raises(InputError, match="holds nan, inf or more than float32 can"):
                read_float32(m.ref(name), like)


def test_a_computed_file_gives_what_is_computed(tmp_path: Path) -> None:
    """Whole, and any run of bytes and numbers of it."""
    x = weights(4, 6)
    save_file({"x": x}, tmp_path / "x.safetensors")
    like = open_checkpoint(tmp_path / "x.safetensors").shards[0]
    doubled: Callable[[str], Numbers] = lambda name: numbers_of(2 * like.tensor(name))  # noqa: E731
    file = VirtualFile(like, like.specs, doubled, {"a": "b"})
    data = (2 * x).numpy().tobytes()
    assert bytes(file.read("x")) == data and torch.equal(file.tensor("x"), 2 * x)
    out = bytearray(11)
    file.read_bytes("x", 5, memoryview(out))
    assert bytes(out) == data[5:16]
    numbers = np.empty((2, 5), np.float32)
    file.read_numbers("x", 3, numbers)
    assert np.array_equal(numbers.reshape(-1), (2 * x).numpy().reshape(-1)[3:13])
    assert file.is_computed("x") and not like.is_computed("x") and file.storage("x") == "x"
    assert file.members == like.members and file.folders == like.folders and file.metadata == {"a": "b"}
    assert torch.equal(tensor_of(TensorRef(file, "x").read_matrix(4, 1, 3)), 2 * x[1:3])
