"""Hold files whose tensors are rows of others': their numbers, any run of their bytes, and where these are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import weights, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.files.checkpoint import open_checkpoint
from loratool.files.containers.regrouped import RegroupedFile, StoredRows
from loratool.files.dtypes import TensorSpec

Q, K, B = weights(6, 4, seed=1), weights(3, 4, seed=2), weights(5, seed=3)
EXPECTED = {
    "fused": torch.cat([Q, K, Q[2:3]]),
    "cut": Q[1:4],
    "vector": B[1:5],
    "renamed": K,
    "of nothing": Q[2:2],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> RegroupedFile:
    base = open_checkpoint(write_model(tmp_path_factory.mktemp("m"), {"q": Q, "k": K, "b": B}, {}))

    def rows(name: str, start: int, stop: int) -> StoredRows:
        return StoredRows(base.shard_of[name], name, start, stop)

    made = {
        "fused": [rows("q", 0, 6), rows("k", 0, 3), rows("q", 2, 3)],
        "cut": [rows("q", 1, 4)],
        "vector": [rows("b", 1, 5)],
        "renamed": [rows("k", 0, 3)],
        "of nothing": [rows("q", 2, 2)],
    }
    specs = {name: TensorSpec("F32", tuple(x.shape)) for name, x in EXPECTED.items()}
    return RegroupedFile(base.shards[0], Path("model.safetensors"), specs, made, {"format": "pt"})


@pytest.mark.parametrize("name", EXPECTED)
def test_whole(file: RegroupedFile, name: str) -> None:
    expected = EXPECTED[name].numpy().tobytes()
    assert bytes(file.read(name)) == expected and torch.equal(file.tensor(name), EXPECTED[name])
    stored = Path(file.file.name).read_bytes()  # a copy takes the bytes from where they lie
    assert b"".join(stored[first : first + length] for _, first, length in file.extents(name)) == expected


@settings(max_examples=40)
@given(st.data())
def test_any_run_of_bytes(file: RegroupedFile, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(EXPECTED)))
    expected = EXPECTED[name].numpy().tobytes()
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    out = bytearray(stop - start)
    file.read_bytes(name, start, memoryview(out))
    assert bytes(out) == expected[start:stop]


def test_what_it_says_of_itself(file: RegroupedFile) -> None:
    assert file.nbytes == sum(x.nbytes for x in EXPECTED.values()) and file.metadata == {"format": "pt"}
    assert not file.scattered and file.begin == {}
