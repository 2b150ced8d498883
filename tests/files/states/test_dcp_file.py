"""Hold the reader of DCP's folders against torch itself, damage of all kinds, and pickles that would run something."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from lib.models.training_runs import Box, cut, write_dcp
from torch import Tensor

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.states import dcp_file
from loratool.files.states.dcp_file import DcpFile
from loratool.files.weights_file import read_parts, require_unchanged

W = torch.arange(11 * 7, dtype=torch.float32).reshape(11, 7)

CUTS = {
    "whole": {},
    "rows": {0: [6, 5]},
    "columns": {1: [2, 4, 1]},
    "blocks": {0: [4, 4, 3], 1: [3, 4]},
    "an empty part": {0: [11, 0]},
}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def load_by_torch(folder: Path) -> Any:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        DcpFile(folder / ".metadata")
    return str(caught.value)


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("how", CUTS)
def test_every_window_of_a_tensor_in_chunks(tmp_path: Path, how: str) -> None:
    folder = write_dcp(tmp_path / "s", {("model", "w"): W}, {("model", "w"): cut(W.shape, CUTS[how])})
    assert torch.equal(load_by_torch(folder)["model"]["w"], W)
    file, data = DcpFile(folder / ".metadata"), as_bytes(W)
    assert torch.equal(file.tensor("w"), W)
    for first in (0, 1, 27, 28, 113, len(data) - 5):
        for length in (0, 1, 4, 29, 150, len(data)):
            out = memoryview(bytearray(min(length, len(data) - first)))
            file.read_bytes("w", first, out)
            assert bytes(out) == data[first : first + len(out)]
    file.close()
    assert all(part.file.closed for part in file.members)


def test_chunks_of_more_dimensions(tmp_path: Path) -> None:
    tensors = {
        "stack": (torch.randn(3, 4, 5).bfloat16(), {0: [2, 1], 2: [2, 3]}),
        "cube": (torch.randn(4, 3, 2, 5).double(), {0: [1, 3], 1: [2, 1], 3: [4, 1]}),
        "vector": (torch.randint(0, 99, (9,)), {0: [4, 5]}),
        "scalar": (torch.tensor(2.5), {}),
        "empty": (torch.empty(0, 3), {}),
        "flags": (torch.tensor([True, False, True]), {0: [1, 2]}),
    }
    state = {("state_dict", name): tensor for name, (tensor, _) in tensors.items()}
    boxes = {("state_dict", name): cut(tensor.shape, how) for name, (tensor, how) in tensors.items()}
    folder = write_dcp(tmp_path / "s", state, boxes, files=3)
    loaded, file = load_by_torch(folder)["state_dict"], DcpFile(folder / ".metadata")
    assert set(file.specs) == set(loaded) == set(tensors)
    for name, tensor in loaded.items():
        assert bytes(file.read(name)) == as_bytes(tensor.reshape(-1)) and file.specs[name].shape == tuple(tensor.shape)
    assert file.scalar("scalar") == 2.5


def test_what_dcp_saves_itself(tmp_path: Path) -> None:
    """The weights are those under `model`; what a trainer has beside them is named and not read."""
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4).bfloat16()).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "rng": torch.ones(3).byte()}
    dcp.save({**state, "lr": {"a": [1, 2.0, torch.ones(3)]}}, checkpoint_id=tmp_path / "s", no_dist=True)
    file = DcpFile(tmp_path / "s" / ".metadata")
    assert file.ignored == ("optimizer", "step", "rng", "lr")
    assert set(file.specs) == set(state["model"])
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in state["model"].items())
    dcp.save({"x.weight": W}, checkpoint_id=tmp_path / "t", no_dist=True)
    assert set(DcpFile(tmp_path / "t" / ".metadata").specs) == {"x.weight"}


def test_the_names_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    names = {
        "module.a._fsdp_wrapped_module.weight": "a.weight",
        "_orig_mod.b._checkpoint_wrapped_module.weight": "b.weight",
        "_forward_module.d.weight": "d.weight",
        "c.module.weight": "c.module.weight",
    }
    folder = write_dcp(tmp_path / "s", {("model", name): W for name in names})
    assert list(DcpFile(folder / ".metadata").specs) == list(names.values())
    folder = write_dcp(tmp_path / "t", {("model", name): W for name in ("a.weight", "module.a.weight")})
    assert "two tensors" in refusal(folder)


def test_weights_in_two_places_are_refused(tmp_path: Path) -> None:
    assert "which are the weights?" in refusal(write_dcp(tmp_path / "s", {("w",): W, ("ema", "w"): W}))
    nested = DcpFile(write_dcp(tmp_path / "t", {("app", "model", "w"): W, ("app", "lr"): 1}) / ".metadata")
    assert set(nested.specs) == {"w"} and nested.ignored == ("app",)
    assert "holds optimizer, and no weights" in refusal(write_dcp(tmp_path / "u", {("optimizer", "s", "m"): W}))


def test_a_folder_is_a_checkpoint_with_the_config_above_it(tmp_path: Path) -> None:
    write_dcp(
        tmp_path / "run" / "pytorch_model_fsdp_0", {("model", "w"): W}, {("model", "w"): cut(W.shape, {0: [5, 6]})}
    )
    write_dcp(tmp_path / "run" / "optimizer_0", {("optimizer", "w"): W})
    (tmp_path / "run" / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path / "run", tmp_path / "run" / "pytorch_model_fsdp_0"):
        opened = open_checkpoint(path)
        assert opened.model_type == "llama" and torch.equal(opened["w"], W)
        assert "pytorch_model_fsdp_0/.metadata" in opened.weight_files
    (tmp_path / "run" / "pytorch_model_fsdp_0" / ".metadata").unlink()
    with pytest.raises(InputError, match="only an optimizer's state"):
        open_checkpoint(tmp_path / "run")


def test_entries_without_a_path_have_their_keys_as_names(tmp_path: Path) -> None:
    """As before DCP wrote paths; what then is no tensor is named by its key."""
    state = {("w",): W, ("optimizer.lr",): 3}
    folder = write_dcp(tmp_path / "s", state, edit=lambda metadata: setattr(metadata, "planner_data", None))
    file = DcpFile(folder / ".metadata")
    assert set(file.specs) == {"w"} and file.ignored == ("optimizer.lr",)


def test_a_component_of_a_pipeline(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "s", {("model", "w"): W}, {("model", "w"): cut(W.shape, {0: [5, 6]})})
    file = DcpFile(folder / ".metadata")
    file.put_under("unet/")
    assert set(file.specs) == {"unet/w"} and torch.equal(file.tensor("unet/w"), W)
    assert file.place == "unet/.metadata"


def test_cuts_along_many_dimensions(tmp_path: Path) -> None:
    x, halves = torch.arange(64.0).view(2, 2, 2, 2, 2, 2), {d: [1, 1] for d in range(6)}
    four = {d: halves[d] for d in range(4)}
    folder = write_dcp(tmp_path / "four", {("model", "w"): x}, {("model", "w"): cut(x.shape, four)})
    assert torch.equal(DcpFile(folder / ".metadata").tensor("w"), x)
    folder = write_dcp(tmp_path / "six", {("model", "w"): x}, {("model", "w"): cut(x.shape, halves)})
    assert "is cut along 6 dimensions, and at most 4 are read" in refusal(folder)


def test_a_part_that_changes_is_named(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "s", {("model", "w"): W}, {("model", "w"): cut(W.shape, {0: [5, 6]})})
    file = DcpFile(folder / ".metadata")
    require_unchanged([file])
    before = b"".join(map(bytes, read_parts(file, "w", 3, 99)))
    with open(folder / "__1_0.distcp", "ab") as part:
        part.write(b"more")
    assert b"".join(map(bytes, read_parts(file, "w", 3, 99))) == before
    with pytest.raises(InputError, match="__1_0.distcp"):
        require_unchanged([file])


class TestDamage:
    """Each is one InputError that names what is wrong, before any tensor is read."""

    ROWS = cut(W.shape, {0: [6, 5]})

    @pytest.mark.parametrize(
        "boxes",
        [
            [((0, 0), (6, 7))],
            [((0, 0), (6, 7)), ((5, 0), (6, 7))],
            [((0, 0), (6, 7)), ((6, 0), (5, 6))],
            [((0, 0), (6, 4)), ((6, 0), (5, 7)), ((0, 3), (6, 4))],
        ],
        ids=["a hole", "an overlap", "a missing column", "an overlap of columns"],
    )
    def test_chunks_that_are_not_the_tensor(self, tmp_path: Path, boxes: list[Box]) -> None:
        assert "overlap, or leave holes" in refusal(
            write_dcp(tmp_path / "s", {("model", "w"): W}, {("model", "w"): boxes})
        )

    @pytest.mark.parametrize(
        ("edit", "message"),
        {
            "a parent folder": (lambda place: setattr(place, "relative_path", "../x.distcp"), "not a file beside it"),
            "an absolute path": (lambda place: setattr(place, "relative_path", "/etc/passwd"), "not a file beside it"),
            "a missing file": (lambda place: setattr(place, "relative_path", "__9_0.distcp"), "__9_0.distcp"),
            "behind the end": (lambda place: setattr(place, "offset", 1 << 40), "cut off"),
            "a negative place": (lambda place: setattr(place, "offset", -1), "cut off"),
            "too long": (lambda place: setattr(place, "length", 1 << 62), "cut off"),
            "too short": (lambda place: setattr(place, "length", 20), "damaged"),
            "not a number": (lambda place: setattr(place, "length", "20"), "cut off"),
            "compressed": (lambda place: setattr(place, "transform_descriptors", ["zstd"]), "compressed"),
        }.values(),
    )
    def test_places_that_lie(self, tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
        def change(metadata: Any) -> None:
            edit(next(iter(metadata.storage_data.values())))

        assert message in refusal(write_dcp(tmp_path / "s", {("model", "w"): W}, edit=change))

    @pytest.mark.parametrize(
        ("edit", "message"),
        {
            "another type": (lambda entry: setattr(entry.properties, "dtype", torch.float64), "F32"),
            "a type without a name": (lambda entry: setattr(entry.properties, "dtype", torch.complex128), "no name"),
            "a larger tensor": (lambda entry: setattr(entry, "size", torch.Size([1 << 40, 7])), "holes"),
            "too many dimensions": (lambda entry: setattr(entry, "size", torch.Size([1] * 65)), "damaged"),
            "chunks of other dimensions": (lambda entry: setattr(entry, "size", torch.Size([77])), "damaged"),
            "larger chunks": (lambda entry: setattr(entry.chunks[0], "sizes", torch.Size([1 << 40, 7])), "overlap"),
            "chunks elsewhere": (lambda entry: setattr(entry.chunks[0], "offsets", torch.Size([3, 0])), "overlap"),
            "no chunks": (lambda entry: setattr(entry, "chunks", []), "holes"),
        }.values(),
    )
    def test_headers_that_lie(self, tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
        def change(metadata: Any) -> None:
            edit(metadata.state_dict_metadata["model.w"])

        assert message in refusal(write_dcp(tmp_path / "s", {("model", "w"): W}, edit=change))

    @pytest.mark.parametrize(
        ("edit", "message"),
        {
            "no place": (lambda m: m.storage_data.clear(), "has no place for one of its chunks"),
            "another storage": (
                lambda m: m.storage_data.update({next(iter(m.storage_data)): next(iter(m.storage_data))}),
                "written by another storage than files (torch.distributed.checkpoint.metadata.MetadataIndex)",
            ),
            "a reserved name": (lambda m: m.planner_data.update({"model.w": ("model", "__metadata__")}), "is reserved"),
            "one name twice": (
                lambda m: m.planner_data.update({"model.v": ("model", "w")}), "two tensors of one name"
            ),
            "chunks of two": (
                lambda m: setattr(m.state_dict_metadata["model.v"], "chunks", m.state_dict_metadata["model.w"].chunks),
                "model.v has no chunks of its own",
            ),
            "chunks that are none": (
                lambda m: setattr(m.state_dict_metadata["model.v"], "chunks", ()), "model.v has no chunks of its own"
            ),
            "a key that is no text": (
                lambda m: object.__setattr__(next(iter(m.storage_data)), "fqn", 5), "a name that is not text"
            ),
            "a place twice": (
                lambda m: [object.__setattr__(index, "fqn", "model.w") for index in m.storage_data],
                "model.w has two chunks at (0, 0)",
            ),
        }.values(),
    )  # fmt: skip
    def test_an_index_that_lies(self, tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
        assert message in refusal(write_dcp(tmp_path / "s", {("model", "w"): W, ("model", "v"): W}, edit=edit))

    def test_what_is_no_tensor_at_a_chunks_place(self, tmp_path: Path) -> None:
        def swap(metadata: Any) -> None:
            weight, step = metadata.storage_data
            metadata.storage_data[weight] = metadata.storage_data[step]

        folder = write_dcp(tmp_path / "s", {("model", "w"): W, ("model", "step"): {"n": 3}}, edit=swap)
        assert "has no tensor where model.w should be" in refusal(folder)

    def test_metadata_that_is_none(self, tmp_path: Path) -> None:
        folder = write_dcp(tmp_path / "s", {("model", "w"): W})
        for content in ({"state_dict_metadata": {}}, None, W.shape):
            (folder / ".metadata").write_bytes(pickle.dumps(content))
            assert "not metadata of torch.distributed.checkpoint" in refusal(folder)

    def test_files_that_end_early(self, tmp_path: Path) -> None:
        folder = write_dcp(tmp_path / "s", {("model", "w"): W}, {("model", "w"): self.ROWS})
        for name in (".metadata", "__0_0.distcp"):
            data = (folder / name).read_bytes()
            for size in (0, 10, len(data) // 2, len(data) - 1):
                (folder / name).write_bytes(data[:size])
                assert name in refusal(folder)
            (folder / name).write_bytes(data)
        DcpFile(folder / ".metadata").close()
        (folder / "__1_0.distcp").unlink()
        assert "__1_0.distcp" in refusal(folder)

    def test_nothing_in_the_pickles_is_run(self, tmp_path: Path) -> None:
        class Runs:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        folder = write_dcp(tmp_path / "s", {("model", "w"): W}, edit=lambda m: setattr(m, "storage_meta", Runs()))
        assert "wants to run posix.system" in refusal(folder) or "wants to run nt.system" in refusal(folder)
        (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
        assert "wants to run" in refusal(folder)
        folder = write_dcp(tmp_path / "t", {("model", "w"): W}, files=1)
        size = (folder / "__0_0.distcp").stat().st_size
        with open(folder / "__0_0.distcp", "wb") as file:
            torch.save(Runs(), file)
            file.write(bytes(max(0, size - file.tell())))
        assert "__0_0.distcp" in refusal(folder)
        assert not (tmp_path / "ran").exists()

    def test_objects_of_unknown_classes_are_named(self, tmp_path: Path) -> None:
        folder = write_dcp(tmp_path / "s", {("model", "w"): W}, edit=lambda m: setattr(m, "planner_data", Path))
        assert "pathlib.Path" in refusal(folder)

    def test_a_chunk_list_of_many_tensors_costs_no_more_than_its_bytes(self, tmp_path: Path) -> None:
        """A pickle of 1 MB could name one list of chunks thousands of times."""

        def share(metadata: Any) -> None:
            entry, chunk = metadata.state_dict_metadata["model.w"], metadata.state_dict_metadata["model.w"].chunks[0]
            entry.chunks = [chunk] * 2_000
            metadata.state_dict_metadata |= {f"model.{i}": entry for i in range(2_000)}
            metadata.planner_data |= {f"model.{i}": ("model", str(i)) for i in range(2_000)}

        folder = write_dcp(tmp_path / "s", {("model", "w"): W}, edit=share)
        begun = perf_counter()
        tracemalloc.start()
        refusal(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert perf_counter() - begun < 10 and peak < 100 << 20

    def test_metadata_that_is_too_large_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dcp_file, "MAX_METADATA", 1000)
        assert "at most 1000" in refusal(write_dcp(tmp_path / "s", {("model", str(i)): W for i in range(9)}))
