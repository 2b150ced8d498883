"""Hold where outputs may be: what no command replaces, what leads on and works, and what is said before any work."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, load_model, weights, write_model, write_peft

import loratool
from loratool.files.output import paths as output_paths
from loratool.files.output.output import Output
from loratool.files.output.paths import check_output_name, check_output_path, check_place, check_undo_files

Run = Callable[..., Any]

# Each way of writing something -> its call; {} is the output
CALLS = {
    "merge to a folder": "merge base adapter -o {}",
    "merge to a file": "merge base adapter -o {}.safetensors",
    "unmerge": "unmerge merged adapter -o {}",
    "unmerge to a file": "unmerge merged.safetensors adapter -o {}.safetensors",
    "unmerge approximately": "unmerge merged adapter --approximate -o {}",
    "extract": "extract base merged --rank 2 -o {}",
    "extract to a file": "extract base merged --rank 2 -o {}.safetensors",
    "init": "init base --rank 2 --target all-linear -o {}",
    "init's residual": "init base --rank 2 --target all-linear --method pissa --residual {} -o fresh",
    "resize": "resize adapter --rank 1 -o {}",
    "resize to a file": "resize adapter --rank 1 -o {}.safetensors",
    "combine": "combine adapter adapter -o {}",
    "combine to a file": "combine adapter adapter -o {}.safetensors",
    "convert an adapter": "convert adapter --to peft --dtype fp16 -o {}",
    "convert an adapter to a file": "convert adapter --to peft -o {}.safetensors",
    "convert for a runtime": "convert adapter --for vllm -o {}",
    "convert a model": "convert base --to safetensors -o {}",
    "convert a model to a file": "convert base --to safetensors -o {}.safetensors",
    "convert a model to a torch file": "convert base --to torch -o {}.pt",
    "convert metadata": "convert adapter --set a=b -o {}.safetensors",
    "a recipe beside": "merge base adapter -o fresh --save-recipe {}.json",
    "a statement beside": "merge base adapter -o fresh --attest {}.json",
    "a page beside": "merge base adapter -o fresh --html {}.html",
}

BESIDE = {"init's residual": ("partial", "former", "scratch")}  # names of places beside the output that are used

SAMPLE = (
    "merge to a folder",
    "unmerge to a file",
    "init's residual",
    "a recipe beside",
    "a statement beside",
    "a page beside",
)

MANY = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in CALLS]


def out_of(call: str, name: str) -> str:
    """Return the output's name in a call."""
    return next(word.format(name) for word in call.split() if "{}" in word)


def is_folder(call: str) -> bool:
    return "{}" in call.split()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    modules = {"model.layers.0.self_attn.q_proj": (8, 6), "model.layers.0.self_attn.k_proj": (8, 6)}
    tensors = {f"{module}.weight": weights(*shape, seed=i) for i, (module, shape) in enumerate(modules.items())}
    write_model(folder / "base", tensors, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    pairs = {module: factors(*shape, 2, seed=i) for i, (module, shape) in enumerate(modules.items())}
    write_peft(folder / "adapter", pairs)
    loratool.merge(folder / "base", folder / "adapter", folder / "merged")
    loratool.merge(folder / "base" / "model.safetensors", folder / "adapter", folder / "merged.safetensors")
    return folder


@pytest.fixture
def work(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a copy of the stage."""
    shutil.copytree(stage, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def make_pipe(place: Path) -> None:
    os.mkfifo(place)


def make_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:  # whose name may be 107 bytes long: bound from its folder
        made.bind(place.name)


def make_link(place: Path) -> None:
    place.symlink_to("nowhere")


def make_link_to_a_folder(place: Path) -> None:
    (place.parent / "other").mkdir()
    place.symlink_to("other")


def make_link_to_a_file(place: Path) -> None:
    (place.parent / "other").write_text("mine")
    place.symlink_to("other")


def make_file(place: Path) -> None:
    place.write_text("mine")


def make_folder(place: Path) -> None:
    place.mkdir()


OBSTACLES = {
    make_pipe: "a named pipe",
    make_socket: "a socket",
    make_link: "a link",
    make_link_to_a_folder: "a link",
    make_link_to_a_file: "a link",
}


def state(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """Return what tells whether anything in a folder was touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        at = path.lstat()
        found[str(path)] = (at.st_ino, at.st_mode, at.st_size, at.st_mtime_ns)
    return found


def refused(run: Run, work: Path, call: str, message: str, code: int = 2) -> str:
    """Run a call that is refused, see that it touches nothing, and return its hint."""
    before = state(work)
    result = run(*shlex.split(call))
    error, *hint = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert error.startswith("error: ") and message in error
    assert len(hint) == 1 and hint[0].startswith("hint: ")
    assert state(work) == before
    return str(hint[0])


def put_in_the_way(run: Run, work: Path, name: str, make: Callable[[Path], None], kind: str) -> None:
    call = CALLS[name]
    place = Path(out_of(call, "x"))
    make(place)
    refused(run, work, f"{call.format('x')} --force", f"{place}: is {kind}, which a ")
    os.unlink(place)
    for added in BESIDE.get(name, ("partial", "former") if is_folder(call) else ("partial",)):
        other = Path(f"{place}.loratool-{added}")
        shutil.rmtree("other", ignore_errors=True)
        Path("other").unlink() if Path("other").exists() else None
        make(other)
        hint = refused(run, work, f"{call.format('x')} --force", f"{other}: is in the way: it is {kind}")
        assert hint == "hint: move it away"
        os.unlink(other)


@pytest.mark.parametrize("name", MANY)
def test_no_command_replaces_a_pipe(name: str, work: Path, run: Run) -> None:
    put_in_the_way(run, work, name, make_pipe, "a named pipe")


@pytest.mark.parametrize("make", OBSTACLES)
@pytest.mark.parametrize("name", ["merge to a folder", "merge to a file"])
def test_no_kind_of_thing_is_replaced(name: str, make: Callable[[Path], None], work: Path, run: Run) -> None:
    put_in_the_way(run, work, name, make, OBSTACLES[make])


@pytest.mark.slow
@pytest.mark.parametrize("make", OBSTACLES)
@pytest.mark.parametrize("name", MANY)
def test_no_command_replaces_any_of_them(name: str, make: Callable[[Path], None], work: Path, run: Run) -> None:
    put_in_the_way(run, work, name, make, OBSTACLES[make])


@pytest.mark.parametrize("name", MANY)
def test_a_file_for_a_folder_and_a_folder_for_a_file(name: str, work: Path, run: Run) -> None:
    call = CALLS[name]
    place = Path(out_of(call, "x"))
    make_file(place) if is_folder(call) else make_folder(place)
    kind, wanted = ("a file", "a folder") if is_folder(call) else ("a folder", "a file")
    refused(run, work, f"{call.format('x')} --force", f"{place}: is {kind}, which {wanted} would replace")


@pytest.mark.parametrize("name", MANY)
def test_the_folder_around_it(name: str, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to be there, to be a folder, and to take files: access(2) tells also root of a read-only file system."""
    call = CALLS[name]
    make_file(Path("plain"))
    refused(run, work, call.format("absent/x"), f"{work}/absent: there is no such folder to write into")
    refused(run, work, call.format("plain/x"), f"{work}/plain: is not a folder to write into")
    make_folder(Path("sealed"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sealed" and access(path, mode))
    refused(run, work, call.format("sealed/x"), f"{work}/sealed: nothing can be written into this folder")


@pytest.mark.parametrize("name", MANY)
def test_names_too_long_for_the_file_system(name: str, work: Path, run: Run) -> None:
    """Of 255 bytes, 17 are `.loratool-partial`; a name of that length is written."""
    call = CALLS[name]
    longest = "ü" + "x" * (255 - 17 - 2 - len(out_of(call, "")))
    for name in ("x" * 256, longest + "y"):
        refused(run, work, call.format(name), f" has a name of {len(os.fsencode(out_of(call, name)))} bytes")
    result = run(*call.format(longest).split())
    assert result.exit_code == 0, result.stderr
    assert Path(out_of(call, longest)).exists()


def test_undo_files_are_long_names_too(tmp_path: Path) -> None:
    """`x.undo.1.loratool-partial` is longer than `x.gguf.loratool-partial`."""
    undo = tmp_path / ("x" * 232 + ".undo.1")
    plan = Output(tmp_path / "x.gguf", True, {}, (), {}, {}, (), undo=undo)
    with pytest.raises(loratool.UsageError, match="undo.1: has a name of 239 bytes"):
        check_undo_files(plan, [], True)


@pytest.mark.parametrize("call", ["merge base adapter -o {}", "resize adapter --rank 1 -o {}"])
@pytest.mark.parametrize("end", ["/", "/.", "//"])
def test_a_file_that_ends_as_a_folder(call: str, end: str, work: Path, run: Run) -> None:
    hint = refused(run, work, call.format("x.safetensors" + end), f"x.safetensors{end}: is a folder's name by its end")
    assert hint == "hint: name the file x.safetensors, or a folder without .safetensors"


@pytest.mark.parametrize("place", ["/dev/null", "/dev/stdout", "/dev/fd/1"])
def test_devices(place: str, work: Path, run: Run) -> None:
    refused(run, work, f"merge base adapter --force -o {place}", f"{place}: is ")


@pytest.mark.parametrize("kind", [stat.S_IFBLK, stat.S_IFCHR])
def test_a_device_of_a_files_name(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setattr(output_paths.stat, "S_IFMT", lambda mode: kind)
    with pytest.raises(loratool.UsageError, match=r"x.safetensors: is a device, which a file would replace"):
        check_place(tmp_path / "x.safetensors", True)


class TestWhatIsRead:
    def test_an_input_under_another_name(self, work: Path, run: Run) -> None:
        """A hard link is the input itself, and at the partial's place it would be emptied."""
        for name in ("y.safetensors", "z.safetensors.loratool-partial"):
            os.link("base/model.safetensors", name)
        for name in ("y.safetensors", "z.safetensors"):
            refused(run, work, f"merge base adapter --force -o {name}", f"{name}: the output would overwrite an input")
        os.link("adapter/adapter_model.safetensors", "w.safetensors")
        for command in ("resize adapter --rank 1", "combine adapter adapter", "merge base adapter"):
            refused(run, work, f"{command} --force -o w.safetensors", "would overwrite an input")

    def test_an_undo_file_under_another_name(self, work: Path, run: Run) -> None:
        """What is at the partial's place is written to."""
        os.link("merged/loratool.undo", "x.undo.loratool-partial")
        said = "x.undo.loratool-partial: the output would replace this input"
        refused(run, work, "merge merged adapter --force -o x.safetensors", said)

    def test_a_folder_whose_files_have_other_names_elsewhere(self, work: Path) -> None:
        """Its names go, and the input keeps its own."""
        before = Path("base/model.safetensors").read_bytes()
        make_folder(Path("x"))
        os.link("base/model.safetensors", "x/model.safetensors")
        loratool.merge("base", "adapter", "x", force=True)
        assert Path("base/model.safetensors").read_bytes() == before != Path("x/model.safetensors").read_bytes()

    @pytest.mark.parametrize("outer", ["x", "x.loratool-partial", "x.loratool-former"])
    def test_an_input_in_the_output(self, outer: str, work: Path, run: Run) -> None:
        make_folder(Path(outer))
        shutil.move("base", f"{outer}/base")
        Path("link").symlink_to(outer)
        for base in (f"{outer}/base", "link/base", f"adapter/../{outer}/base"):
            refused(run, work, f"merge {base} adapter --force -o x", "x: the output would overwrite an input")

    def test_an_input_in_the_scratch_folder(self, work: Path, run: Run) -> None:
        make_folder(Path("x.loratool-scratch"))
        shutil.move("base", "x.loratool-scratch/base")
        call = CALLS["init's residual"].replace("base", "x.loratool-scratch/base", 1).format("x")
        refused(run, work, call, "x.loratool-scratch: holds an input, and would be emptied")

    def test_an_input_behind_a_link_in_the_output(self, work: Path, run: Run) -> None:
        """Its bytes would stay, its name would not."""
        make_folder(Path("x"))
        Path("x/link").symlink_to("../base")
        refused(run, work, "merge x/link adapter --force -o x", "x: the output would overwrite an input")

    def test_an_output_in_an_input(self, work: Path) -> None:
        """So the default name is, where the command runs in the model's folder: nothing that is read changes."""
        before = load_model(Path("base"))
        os.chdir("base")
        report = loratool.merge(".", "../adapter")
        assert report.out == "merged" and report.not_copied == ()
        assert loratool.verify(".", "../adapter", "merged").status == "proven"
        assert load_model(Path(".")).keys() == before.keys()

    def test_what_others_have_put_there(self, work: Path, run: Run) -> None:
        make_folder(Path("x"))
        make_pipe(Path("x/pipe"))
        refused(run, work, "merge base adapter --force -o x", "x: holds pipe")


class TestWhatLeadsOn:
    @pytest.mark.parametrize("name", ["merge to a folder", "resize", "a recipe beside", "convert metadata"])
    def test_a_link_above_the_output(self, name: str, work: Path, run: Run) -> None:
        make_folder(Path("real"))
        Path("link").symlink_to("real")
        assert run(*CALLS[name].format("link/x").split()).exit_code == 0
        assert Path(out_of(CALLS[name], "real/x")).exists() and Path("link").is_symlink()

    def test_a_folder_of_another_file_system(self, work: Path, tmp_path: Path) -> None:
        """Everything is built beside the output, so that no rename crosses file systems."""
        other = Path("/dev/shm", f"loratool-test-{os.getpid()}")
        other.mkdir()
        try:
            Path("link").symlink_to(other)
            loratool.merge("base", "adapter", "link/x")
            loratool.merge("base", "adapter", other / "x.safetensors")
            assert sorted(os.listdir(other)) == ["x", "x.safetensors", "x.undo"]
        finally:
            shutil.rmtree(other)

    def test_dots_after_a_link_lead_where_the_system_says(self, work: Path) -> None:
        """`link/../base` is beside the folder that the link leads to: no input, though it is spelled like one."""
        Path("far/away").mkdir(parents=True)
        Path("link").symlink_to("far/away")
        loratool.merge("base", "adapter", "link/../base")
        assert Path("far/base/model.safetensors").is_file()

    def test_an_output_whose_path_leads_through_itself(self, work: Path, run: Run) -> None:
        """Set aside, the folder would be no longer on the way to where the new one is built."""
        told = "merged/../merged: leads through the folder that it names"
        hint = refused(run, work, "merge base adapter --force -o merged/../merged", told)
        assert hint == "hint: name it without .."
        assert run("merge", "base", "adapter", "--force", "-o", "base/../merged").exit_code == 0

    def test_the_hint_of_a_link_and_a_mount_can_be_followed(
        self, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_folder(Path("real"))
        Path("a link").symlink_to("real")
        hint = refused(run, work, "merge base adapter -o 'a link'", "a link: is a link, which a folder would replace")
        assert hint == "hint: -o 'a link/merged' writes into it, or name another output with -o"
        assert run("merge", "base", "adapter", *shlex.split(hint)[1:3]).exit_code == 0
        assert Path("real/merged/model.safetensors").is_file()
        make_folder(Path("there"))
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "there")
        hint = refused(run, work, "resize adapter --rank 1 -o there", "there: is a mount point")
        assert hint.startswith("hint: -o there/adapter writes into it")

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems take no names that are not Unicode")
    def test_a_name_that_is_no_utf8(self, work: Path) -> None:
        name = os.fsdecode(b"\xff\x1b[31m\n")
        for out in (name, f"{name}.safetensors"):
            loratool.merge("base", "adapter", out)
            loratool.unmerge(out, "adapter", out.replace(name, f"{name}back"))
        assert Path(f"{name}back/model.safetensors").read_bytes() == Path("base/model.safetensors").read_bytes()


def test_a_name_with_a_null_byte_is_no_path(work: Path) -> None:
    with pytest.raises(loratool.UsageError, match="is not a path"):
        loratool.merge("base", "adapter", "x\0y")


def test_an_output_that_a_killed_run_has_set_aside_exists(tmp_path: Path) -> None:
    """Under its name: a dry run says so, and only --force replaces it."""
    (tmp_path / "out.loratool-former").mkdir()
    (tmp_path / "out.loratool-former" / "model.safetensors").touch()
    with pytest.raises(
        loratool.NeedsFlag, match=r"exists already, as out\.loratool-former: a run was killed"
    ) as refused:
        check_output_path(tmp_path / "out", False, [], force=False)
    assert "--force" in (refused.value.remedy or "")
    assert check_output_path(tmp_path / "out", False, [], force=False, dry_run=True)
    assert not check_output_path(tmp_path / "out", False, [], force=True)


def test_a_stream_is_no_output() -> None:
    with pytest.raises(loratool.UsageError, match="and a stream cannot be") as refused:
        check_output_name("-")
    assert refused.value.culprit == "-"
