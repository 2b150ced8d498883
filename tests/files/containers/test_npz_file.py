"""Hold the reader of NumPy archives against numpy.load, and against arrays and damage that it must refuse."""

from __future__ import annotations

import struct
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import few, load_model, weights, write_model

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, NeedsFlag
from loratool.files.checkpoint import open_checkpoint, open_weights
from loratool.files.containers.npz_file import TYPES, NpzFile

KINDS = [each for each in TYPES if each != "V2"]


def savez(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("kind", few(KINDS, "f4", "i2", "b1"))
def test_arrays_are_those_of_numpy(tmp_path: Path, kind: str) -> None:
    numbers = np.random.default_rng(1).integers(0, 2, 24).astype(kind)
    arrays = {
        "rows": numbers.reshape(2, 3, 4),
        "columns": np.asfortranarray(numbers.reshape(4, 6)),
        "layer.0.x": numbers,
        "number": numbers[1].reshape(()),
        "none": numbers[:0].reshape(3, 0),
    }
    with closing(open_weights(savez(tmp_path / "a.npz", **arrays))) as file:
        assert isinstance(file, NpzFile)
        theirs = np.load(tmp_path / "a.npz")
        assert set(file.specs) == set(theirs)
        for name, array in theirs.items():
            assert file.specs[name].shape == array.shape
            assert bytes(file.read(name)) == array.tobytes(), name
            half = memoryview(bytearray(array.nbytes // 2))
            file.read_bytes(name, array.nbytes - len(half), half)
            assert bytes(half) == array.tobytes()[array.nbytes - len(half) :]


REFUSED = {
    "big": (np.ones(3, ">f4"), "does not store it as numbers in little-endian order"),
    "text": (np.array(["a", "b"]), "does not store it as numbers"),
    "objects": (np.array([{}, None], object), "does not store it as numbers"),
    "records": (np.zeros(2, [("a", "f4"), ("b", "i2")]), "does not store it as numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_arrays_are_refused(tmp_path: Path, case: str) -> None:
    array, said = REFUSED[case]
    path = savez(tmp_path / "a.npz", fine=np.ones(2), x=array)
    with pytest.raises(InputError, match=said) as caught:
        open_weights(path)
    assert caught.value.culprit == "x"


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.ones(30))
    with pytest.raises(InputError, match="holds a compressed"):
        open_weights(path)
    savez(path, a=np.ones(3))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("b.txt", "x")
    with pytest.raises(InputError, match=r"holds b\.txt, and is a zip archive"):
        open_weights(path)
    with zipfile.ZipFile(savez(path, a=np.ones(3)), "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a.npy", file.read("a.npy"))
    with pytest.raises(InputError, match="two entries have one name"):
        open_weights(path)


def test_damage_is_refused(tmp_path: Path) -> None:
    """Cut anywhere the file has no list of entries; a wrong length in a header is found by the entry's."""
    path = savez(tmp_path / "a.npz", a=np.ones((3, 2), "f"), b=np.ones(4, "f"))
    whole = path.read_bytes()
    for count in range(60, len(whole), 7):
        path.write_bytes(whole[:count])
        with pytest.raises(InputError):
            open_weights(path)
    at = whole.index(b"\x93NUMPY")
    for place, data in ((at, b"x"), (at + 8, struct.pack("<H", 60_000)), (whole.index(b"(3, 2)"), b"(3, 9)")):
        path.write_bytes(whole[:place] + data + whole[place + len(data) :])
        with pytest.raises(InputError, match=r"damaged|cut off|longer or shorter"):
            open_weights(path)


def test_an_adapter_of_mlx_is_merged(tmp_path: Path) -> None:
    """It has no config, so its scale is asked for, with what the trainers had."""
    W, module = weights(6, 4), "model.layers.0.self_attn.q_proj"
    a, b = np.float32(weights(4, 2, seed=1)), np.float32(weights(6, 2, seed=2))
    write_model(tmp_path / "base", {f"{module}.weight": W}, {"model_type": "llama"})
    (tmp_path / "a").mkdir()
    savez(tmp_path / "a/adapters.npz", **{f"{module}.lora_a": a, f"{module}.lora_b": b.T})
    with pytest.raises(NeedsFlag, match=r"no config that says the scale") as caught:
        open_adapter(tmp_path / "a")
    assert "a scale of 2, 10 or 20" in str(caught.value.remedy)
    loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=40.0, undo=False)
    expected = np.float64(W) + 20 * np.float64(b) @ np.float64(a).T
    assert np.array_equal(load_model(tmp_path / "out")[f"{module}.weight"].numpy(), expected.astype("f"))


def test_a_model_is_merged_into(tmp_path: Path) -> None:
    W, module = weights(6, 4), "model.layers.0.self_attn.q_proj"
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    savez(tmp_path / "base/weights.npz", **{f"{module}.weight": np.asfortranarray(W.numpy()), "norm": np.ones(4, "f")})
    a, b = np.float32(weights(4, 2, seed=1)), np.float32(weights(6, 2, seed=2))
    savez(tmp_path / "adapters.npz", **{f"{module}.lora_a": a, f"{module}.lora_b": b.T})
    loratool.merge(tmp_path / "base", tmp_path / "adapters.npz", tmp_path / "out", alpha=4.0)
    merged = load_model(tmp_path / "out")
    expected = np.float64(W) + 2 * np.float64(b) @ np.float64(a).T
    assert np.array_equal(merged[f"{module}.weight"].numpy(), expected.astype("f"))
    assert np.array_equal(merged["norm"].numpy(), np.ones(4, "f"))
    loratool.unmerge(tmp_path / "out", tmp_path / "adapters.npz", tmp_path / "back", alpha=4.0)
    with closing(open_checkpoint(tmp_path / "back")) as back:
        assert np.array_equal(back[f"{module}.weight"].numpy(), W.numpy())
