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
from loratool.files.relaid import RelaidFile, RelaidTensor, StoredStack

E, ROWS, COLUMNS = 3, 6, 5

W = torch.arange(E * ROWS * COLUMNS, dtype=torch.float32).view(E, ROWS, COLUMNS)
V = -W - 1
SHUFFLED = [int(i) for i in np.random.default_rng(0).permutation(2 * ROWS)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> RelaidFile:
    folder = write_model(tmp_path_factory.mktemp("relaid"), {"w": W, "v": V, "half": W.half()}, {})
    base = open_checkpoint(folder)
    w, v, half = (StoredStack(base.ref(name), ROWS, COLUMNS) for name in ("w", "v", "half"))
    crossed = StoredStack(base.ref("w"), E * COLUMNS, ROWS, transposed_rows=COLUMNS)
    tensors = {
        "as it is": RelaidTensor((E, ROWS, COLUMNS), (w,)),
        "second": RelaidTensor((ROWS, COLUMNS), (w,), first=1),
        "reversed": RelaidTensor((E, ROWS, COLUMNS), (w,), list(range(ROWS))[::-1]),
        "both": RelaidTensor((E, 2 * ROWS, COLUMNS), (w, v), SHUFFLED),
        "turned": RelaidTensor((E, COLUMNS, 2 * ROWS), (w, v), SHUFFLED, transposed=True),
        "less one": RelaidTensor((ROWS, COLUMNS), (w,), added=-1.0, first=2),
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
