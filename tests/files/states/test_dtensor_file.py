"""Hold the reader of what each rank saved against the tensors that DTensor cut, and against damage."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.models.training_runs import Partial, Replicate, Shard, write_ranks

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.states.dtensor_file import DTensorFile

W = torch.arange(11 * 7, dtype=torch.float32).reshape(11, 7)


def opened(folder: Path) -> DTensorFile:
    return DTensorFile(min(folder.glob("model_world_size_*.pt")))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((1,), [Shard(0)]),
        ((2,), [Shard(0)]),
        ((3,), [Shard(1)]),
        ((5,), [Shard(1)]),  # 7 columns in parts of 2: the last is 1, and none are left for the fifth
        ((2,), [Replicate()]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 3), [Shard(1), Shard(0)]),
        ((2, 2), [Shard(0), Shard(0)]),
    ],
    ids=str,
)
def test_every_placement(tmp_path: Path, mesh: tuple[int, ...], placements: list[Any]) -> None:
    state = {"w": (W, placements), "half": (W.bfloat16(), placements), "plain": torch.ones(3), "step": 3}
    file = opened(write_ranks(tmp_path / "actor", mesh, state))
    assert torch.equal(file.tensor("w"), W) and torch.equal(file.tensor("half"), W.bfloat16())
    assert torch.equal(file.tensor("plain"), torch.ones(3)) and file.ignored == ("step",)
    assert len(file.members) == torch.Size(mesh).numel()


def test_the_names_of_before_torch_2_5(tmp_path: Path) -> None:
    """Torch 2.5 moved DTensor: what older versions saved names its classes in other modules."""
    folder = write_ranks(tmp_path / "actor", (2,), {"w": (W, [Shard(1)])})
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                older = data.replace(
                    b"torch.distributed.tensor\nDTensor\n", b"torch.distributed._tensor.api\nDTensor\n"
                )
                archive.writestr(name, older.replace(b"torch.distributed.tensor.", b"torch.distributed._tensor."))
    assert torch.equal(opened(folder).tensor("w"), W)


def test_the_folder_that_verl_saves(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "global_step_1" / "actor", (2,), {"w": (W, [Shard(0)])})
    for rank in range(2):
        torch.save({"state": {}}, folder / f"optim_world_size_2_rank_{rank}.pt")
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text('{"model_type": "llama"}')
    for path in (folder, folder.parent, folder / "model_world_size_2_rank_1.pt"):
        found = open_checkpoint(path)
        assert found.model_type == "llama" and torch.equal(found["w"], W)
    write_ranks(tmp_path / "global_step_1" / "critic", (2,), {"w": (W, [Shard(0)])})
    with pytest.raises(InputError, match="actor/model_world_size_2_rank_0.pt"):
        open_checkpoint(folder.parent)


def test_sums_over_ranks_are_refused(tmp_path: Path) -> None:
    assert "as Partial" in refusal(write_ranks(tmp_path / "a", (2,), {"w": (W, [Partial()])}))


def test_a_missing_rank(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "a", (3,), {"w": (W, [Shard(0)])})
    (folder / "model_world_size_3_rank_1.pt").unlink()
    assert "2 ranks of a run of 3" in refusal(folder)


def edited(folder: Path, change: Callable[[Any], None]) -> Path:
    path = folder / "model_world_size_2_rank_1.pt"
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
    return folder


def test_ranks_that_say_different_things(tmp_path: Path) -> None:
    def write(name: str) -> Path:
        return write_ranks(tmp_path / name, (2,), {"w": (W, [Shard(0)]), "plain": torch.ones(3)})

    other = write_ranks(tmp_path / "other", (2,), {"w": (W.T.contiguous(), [Shard(0)])})
    mixed = write("mixed")
    (other / "model_world_size_2_rank_1.pt").replace(mixed / "model_world_size_2_rank_1.pt")
    assert "on one rank than on another" in refusal(mixed)
    assert "has other numbers" in refusal(edited(write("numbers"), lambda state: state["plain"].add_(1)))
    assert "not in model_world_size_2_rank_1.pt" in refusal(edited(write("names"), lambda state: state.pop("plain")))
    assert "has (6, 7) of it" in refusal(_copied(write("one file twice")))


def test_groups_of_ranks_that_should_have_the_same(tmp_path: Path) -> None:
    """Of the files of two runs, what is read of a tensor is held against the copy of the other group."""
    folder = write_ranks(tmp_path / "a", (2, 2), {"w": (W, [Replicate(), Shard(0)])})
    other = write_ranks(tmp_path / "b", (2, 2), {"w": (W + 1, [Replicate(), Shard(0)])})
    (other / "model_world_size_4_rank_3.pt").replace(folder / "model_world_size_4_rank_3.pt")
    with pytest.raises(InputError, match="w: has other numbers on one group of ranks"):
        opened(folder).tensor("w")


CUT = {"w": (W[:10].clone(), [Shard(0)])}


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "a reserved name": (lambda state: state.update(__metadata__=state["w"]), "is reserved or not text"),
        "no tensors": (lambda state: state.clear(), "holds no tensors"),
        "no part": (lambda state: setattr(state["w"], "_local_tensor", None), "w has no shape or no part"),
        "no place": (lambda state: setattr(mesh_of(state), "_coordinate_on_dim", None), "w has no place in a mesh"),
        "half a place": (lambda state: setattr(mesh_of(state), "_coordinate_on_dim", [0, 0]), "w has no place"),
        "a cut of nothing": (
            lambda state: setattr(state["w"]._spec, "placements", (Shard(-1),)), "w is cut along no dimension"
        ),
    }.values(),
)  # fmt: skip
def test_a_rank_that_lies(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    folder = write_ranks(tmp_path / "a", (2,), CUT)
    assert torch.equal(opened(folder).tensor("w"), W[:10])
    for rank in range(2):
        path = folder / f"model_world_size_2_rank_{rank}.pt"
        state = torch.load(path, weights_only=False)
        change(state)
        torch.save(state, path)
    assert message in refusal(folder)


def mesh_of(state: Any) -> Any:
    return state["w"]._spec.mesh


def test_a_file_without_a_dict(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "a", (2,), CUT)
    torch.save([W], folder / "model_world_size_2_rank_1.pt")
    assert "holds no dict of tensors" in refusal(folder)


def test_a_part_on_more_ranks_than_another(tmp_path: Path) -> None:
    """The last rank's file is of another mesh, in which it has the first part."""
    folder = write_ranks(tmp_path / "a", (2, 2), {"w": (W[:10].clone(), [Replicate(), Shard(0)])})
    path = folder / "model_world_size_4_rank_3.pt"
    state = torch.load(path, weights_only=False)
    mesh_of(state)._coordinate_on_dim = [1, 0]
    torch.save(state, path)
    assert "is on more ranks with one part than with another" in refusal(folder)


def test_tensors_with_attributes_and_copies(tmp_path: Path) -> None:
    """A plain tensor that has attributes is saved by a function of its own; copies have the place of the first."""
    marked = torch.arange(3.0)
    marked.origin = "x"  # type: ignore[attr-defined]
    replicated = (W, [Replicate(), Shard(0)])
    folder = write_ranks(tmp_path / "a", (2, 2), {"w": replicated, "v": replicated, "plain": marked})
    file = opened(folder)
    assert torch.equal(file.tensor("plain"), marked) and file.storage("w") != file.storage("v")


def _copied(folder: Path) -> Path:
    data = (folder / "model_world_size_2_rank_0.pt").read_bytes()
    (folder / "model_world_size_2_rank_1.pt").write_bytes(data)
    return folder


def test_nothing_in_the_pickles_is_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = write_ranks(tmp_path / "a", (2,), {"w": (W, [Shard(0)]), "extra": Runs()})
    assert "wants to run" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_rank_s_file_in_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    """DCP's parts in safetensors do not say how large a tensor is, of which the last part may be missing."""
    from safetensors.torch import save_file

    save_file({"w": W[:6]}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    for path in (tmp_path, next(tmp_path.iterdir())):
        with pytest.raises(InputError, match="one rank's part"):
            open_checkpoint(path)
