"""Hold tensors that are made of rows of others: whole, and any run of their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.files.checkpoint import open_checkpoint
from loratool.files.relaid import RelaidFile, RelaidTensor, StoredStack, logarithm, minus_one

E, ROWS, COLUMNS = 3, 6, 5

W = torch.arange(E * ROWS * COLUMNS, dtype=torch.float32).view(E, ROWS, COLUMNS)
V = -W - 1
BF16 = torch.linspace(-5, 5, W.numel()).view(W.shape).bfloat16().float()
SHUFFLED = [int(i) for i in np.random.default_rng(0).permutation(2 * ROWS)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> RelaidFile:
    folder = write_model(
        tmp_path_factory.mktemp("relaid"), {"w": W, "v": V, "half": W.half(), "exp": -torch.exp(BF16)}, {}
    )
    base = open_checkpoint(folder)
    w, v, half, exp = (StoredStack(base.ref(name), ROWS, COLUMNS) for name in ("w", "v", "half", "exp"))
    crossed = StoredStack(base.ref("w"), E * COLUMNS, ROWS, transposed_rows=COLUMNS)
    tensors = {
        "as it is": RelaidTensor((E, ROWS, COLUMNS), (w,)),
        "second": RelaidTensor((ROWS, COLUMNS), (w,), first=1),
        "reversed": RelaidTensor((E, ROWS, COLUMNS), (w,), list(range(ROWS))[::-1]),
        "both": RelaidTensor((E, 2 * ROWS, COLUMNS), (w, v), SHUFFLED),
        "turned": RelaidTensor((E, COLUMNS, 2 * ROWS), (w, v), SHUFFLED, transposed=True),
        "less one": RelaidTensor((ROWS, COLUMNS), (w,), change=minus_one, first=2),
        "columns": RelaidTensor((E, ROWS, COLUMNS), (w,), columns_order=[4, 0, 3, 1, 2]),
        "logarithm": RelaidTensor((ROWS, COLUMNS), (exp,), change=logarithm, first=1),
        "crossed": RelaidTensor((E * COLUMNS, ROWS), (crossed,)),
        "two types": RelaidTensor((2 * ROWS, COLUMNS), (half, w)),
    }
    return RelaidFile(base.shards[0], Path("model.safetensors"), tensors, {})


EXPECTED = {
    "as it is": W,
    "second": W[1],
    "reversed": W.flip(1),
    "both": torch.cat([W, V], 1)[:, SHUFFLED],
    "turned": torch.cat([W, V], 1)[:, SHUFFLED].mT,
    "less one": W[2] - 1,
    "columns": W[:, :, [4, 0, 3, 1, 2]],
    "logarithm": BF16[1],
    "crossed": torch.cat([each.T for each in W]),
    "two types": torch.cat([W[0], W[0]]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_whole(file: RelaidFile, name: str) -> None:
    assert torch.equal(file.tensor(name), EXPECTED[name]) and file.specs[name].shape == tuple(EXPECTED[name].shape)
    assert bytes(file.read(name)) == EXPECTED[name].contiguous().numpy().tobytes()


@pytest.mark.parametrize("name", EXPECTED)
@given(data=st.data())
@settings(max_examples=20)
def test_any_run_of_numbers(file: RelaidFile, name: str, data: st.DataObject) -> None:
    flat = EXPECTED[name].reshape(-1)
    first = data.draw(st.integers(0, len(flat) - 1))
    out = np.empty(data.draw(st.integers(1, len(flat) - first)), np.float32)
    file.read_numbers(name, first, out)
    assert np.array_equal(out, flat[first : first + len(out)].numpy())


def test_only_whole_rows_of_one_tensor_have_bytes(file: RelaidFile) -> None:
    plain = [name for name in EXPECTED if not file.is_computed(name)]
    assert plain == ["as it is", "second"]
    for name in plain:
        data = b""
        for source, start, nbytes in file.extents(name):
            source.seek(start)
            data += source.read(nbytes)
        assert data == EXPECTED[name].contiguous().numpy().tobytes()


def test_logarithms_of_any_float32() -> None:
    """Most give the same -exp by torch, whose exp is wrong in the last bit for some; the others are a bit beside."""
    x = torch.empty(100_000).uniform_(0.01, 16, generator=torch.Generator().manual_seed(0)).log_()
    A = -torch.exp(x)
    back = -torch.exp(torch.from_numpy(logarithm(A.numpy())))
    assert (back == A).double().mean() > 0.999 and torch.allclose(back, A, rtol=2e-7, atol=0)


@pytest.mark.parametrize("number", [0.0, 1.0, float("nan")])
def test_no_logarithm(number: float) -> None:
    with pytest.raises(ValueError, match="not below 0"):
        logarithm(np.array([-1.0, number], np.float32))
