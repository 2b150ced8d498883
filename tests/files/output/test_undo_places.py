"""Hold which undo files belong to a single file's weights, after a run that was killed between two renames."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import factors, weights, write_model, write_peft
from safetensors.torch import save_file

import loratool
from loratool.durable.partial import former_path
from loratool.files.output.undo_places import kept_undo, undo_chain
from loratool.undo.reader import belongs


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Weights with their undo file, and a copy of it set aside."""
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4), "y.weight": weights(6, 4, seed=1)}, {})
    adapter = write_peft(tmp_path / "adapter", {"x": factors(6, 4, 2)})
    loratool.merge(base, adapter, tmp_path / "out.safetensors")
    shutil.copy(tmp_path / "out.undo", former_path(tmp_path / "out.undo"))
    return tmp_path / "out.safetensors"


def test_what_was_set_aside_belongs_to_the_weights(out: Path) -> None:
    """As long as its hashes say so; else those in their places do, whatever is wrong with the others."""
    place, former = out.with_suffix(".undo"), former_path(out.with_suffix(".undo"))
    assert undo_chain(out, True, belongs) == [former]
    whole = former.read_bytes()
    former.write_bytes(whole[:-9])
    assert undo_chain(out, True, belongs) == [place]
    former.write_bytes(b"x" + whole[1:])  # of another kind
    assert undo_chain(out, True, belongs) == [place]
    former.write_bytes(whole)
    data = out.read_bytes()
    for wrong in (data[:-4] + b"\0\0\0\0", data[:-4], b""):
        out.write_bytes(wrong)
        assert undo_chain(out, True, belongs) == [place]
    save_file({"y.weight": weights(6, 4)}, out)
    assert undo_chain(out, True, belongs) == [place]
    former.unlink()
    assert undo_chain(out, True, belongs) == [place]


def test_what_was_set_aside_by_a_killed_run_comes_back(out: Path) -> None:
    """With what lies in the places of more, which belongs to weights that never had their name."""
    place, former = out.with_suffix(".undo"), former_path(out.with_suffix(".undo"))
    data = place.read_bytes()
    place.write_bytes(data + b"of the killed run")
    (out.parent / "out.undo.1").write_bytes(data)
    with pytest.raises(RuntimeError), kept_undo(out, [place], belongs):
        assert place.read_bytes() == former.read_bytes() == data
        raise RuntimeError
    assert sorted(path.name for path in out.parent.glob("out*")) == ["out.safetensors", "out.undo"]
    assert place.read_bytes() == data


def test_an_error_after_the_weights_were_replaced_leaves_what_was_set_aside(out: Path) -> None:
    """The new name may not be on the disk yet, and after a lost power the former weights are there again."""
    place, former = out.with_suffix(".undo"), former_path(out.with_suffix(".undo"))
    former.unlink()
    data = place.read_bytes()
    with pytest.raises(RuntimeError), kept_undo(out, [place], belongs):
        assert former.read_bytes() == data
        raise RuntimeError  # before it
    assert place.read_bytes() == data and not former.exists()
    with pytest.raises(RuntimeError), kept_undo(out, [place], belongs):
        shutil.copy(out, out.with_name("new"))
        out.with_name("new").replace(out)
        raise RuntimeError
    assert former.read_bytes() == data
