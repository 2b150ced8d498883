"""Hold reads of the stored tensors of codes and scales: boxes of columns, bit patterns, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lib.files.one_weight import random_bytes
from safetensors.torch import save_file

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.codecs.codec import LONG_ROW, StoredTensor

WIDE = LONG_ROW + 100


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return {
        "wide": random_bytes(3, WIDE),
        "halves": random_bytes(5, 2 * WIDE, seed=1).view(torch.float16).nan_to_num(1.0, 1.0, 1.0),
        "words": torch.arange(-6, 6, dtype=torch.int32).view(3, 4),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture(scope="module")
def stored(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredTensor]:
    path = tmp_path_factory.mktemp("stored") / "x.safetensors"
    save_file(tensors, path)
    file = open_checkpoint(path).shards[0]
    return {name: StoredTensor(file, name) for name in tensors}


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (7, 40), (WIDE - 3, WIDE), (0, WIDE), (5, WIDE - 5), (9, 9)])
def test_columns_of_rows(
    stored: dict[str, StoredTensor], tensors: dict[str, torch.Tensor], start: int, stop: int
) -> None:
    """Of long rows only the columns are read, where these are few."""
    found = stored["wide"].box(3, WIDE, start, stop)
    assert np.array_equal(found, tensors["wide"].numpy()[:, start:stop])
    assert np.array_equal(stored["wide"].box(2, WIDE, start, stop, WIDE), tensors["wide"].numpy()[1:, start:stop])
    halves = stored["halves"].float_box(5, WIDE, start, stop)
    assert np.array_equal(halves, tensors["halves"].double().numpy()[:, start:stop])


def test_numbers_and_their_bits(stored: dict[str, StoredTensor]) -> None:
    words, some, none = stored["words"], np.empty(3, np.int32), np.empty(0, np.int32)
    words.read(2, some)
    words.read(3, none)
    assert some.tolist() == [-4, -3, -2] and words.floats(10).tolist() == [4.0, 5.0]
    assert words.integers(4, 2).tolist() == [2**32 - 2, 2**32 - 1]
    assert words.integers(3, 0).tolist() == words.floats(12).tolist() == []


def test_what_is_no_float_is_not_read_as_one(stored: dict[str, StoredTensor]) -> None:
    for name in ("words", "flags"):
        with pytest.raises(InputError, match="not a floating-point type") as refused:
            open_checkpoint(stored[name].file.path).ref(name).read_matrix(1, 0, 1)
        assert refused.value.culprit == name
