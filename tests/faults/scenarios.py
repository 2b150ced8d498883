"""Name every way in which a command writes, and make the folder in which all of them run.

A scenario is a call and another one, whose output it replaces. The paths are relative to the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import FIXTURES, factors, run_command, weights, write_model, write_peft
from lib.models.diffusers_folders import pipeline
from lib.models.gguf_models import llama_weights, write_llama
from safetensors.torch import load_file, save_file

MERGE_FOLDER = "merge base adapter:{} -o out"
MERGE_FILE = "merge base.safetensors adapter:{} -o out.safetensors"
PISSA = "init base --method pissa --rank {} --target q_proj --residual residual -o out"


Files = dict[str, bytes]  # path in a folder -> content, b"/" of an empty folder


@dataclass(frozen=True)
class Scenario:
    """A command that writes.

    Attributes:
        new: the call; what it writes it may replace.
        old: the call whose output that is.
        outputs: the paths that the call names for its output.
        fails: whether the call fails in the middle of its work.
    """

    new: str
    old: str
    outputs: tuple[str, ...]
    fails: bool = False

    @property
    def resumes(self) -> bool:
        """Whether the command takes --resume: it writes a model, or factors one."""
        command, first, *_ = self.new.split()
        is_model = command == "convert" and not first.startswith(("adapter", "llama")) and "--set" not in self.new
        is_ours = command in ("patch", "apply") and "--to" not in self.new
        return command in ("merge", "unmerge", "extract") or is_model or is_ours


def _of(new: str, old: str, *outputs: str, fails: bool = False) -> Scenario:
    return Scenario(new, old, outputs, fails)


SCENARIOS = {
    "merge, folder": _of(MERGE_FOLDER.format(0.5), MERGE_FOLDER.format(1), "out"),
    "merge, folder, no undo": _of(MERGE_FOLDER.format("0.5 --no-undo"), MERGE_FOLDER.format(1), "out"),
    "merge, folder, third": _of("merge twice adapter:0.5 -o out", "merge once adapter:0.3 -o out", "out"),
    "merge, pipeline": _of("merge pipe unet.safetensors:0.5 -o out", "merge pipe unet.safetensors -o out", "out"),
    "merge, file": _of(MERGE_FILE.format(0.5), MERGE_FILE.format(1), "out.safetensors"),
    "merge, file, no undo": _of(MERGE_FILE.format("0.5 --no-undo"), MERGE_FILE.format(1), "out.safetensors"),
    "merge, file, over twice": _of(
        MERGE_FILE.format(0.5), "merge once.safetensors adapter:0.3 -o out.safetensors", "out.safetensors"
    ),
    "merge, file, no undo, over twice": _of(
        MERGE_FILE.format("0.5 --no-undo"),
        "merge once.safetensors adapter:0.3 -o out.safetensors",
        "out.safetensors",
    ),
    "merge, file, third": _of(
        "merge twice.safetensors adapter:0.5 -o out.safetensors",
        "merge once.safetensors adapter:0.3 -o out.safetensors",
        "out.safetensors",
    ),
    "swap, folder": _of("merge once adapter:0.5 --replace adapter -o out", MERGE_FOLDER.format(1), "out"),
    "swap, file, third": _of(
        "merge twice.safetensors adapter:0.3 --replace adapter:0.5 -o out.safetensors",
        MERGE_FILE.format(1),
        "out.safetensors",
    ),
    "merge, GGUF": _of("merge base.gguf llama:0.5 -o out.gguf", "merge base.gguf llama -o out.gguf", "out.gguf"),
    "merge, torch file": _of(
        "merge base.bin adapter:0.5 -o out.safetensors", "merge base.bin adapter -o out.safetensors", "out.safetensors"
    ),
    "merge that fails, file": _of(MERGE_FILE.format("1e42"), MERGE_FILE.format(1), "out.safetensors", fails=True),
    "merge that fails, file, over twice": _of(
        "merge twice.safetensors adapter:1e42 -o out.safetensors",
        "merge once.safetensors adapter:0.3 -o out.safetensors",
        "out.safetensors",
        fails=True,
    ),
    "merge that fails, folder": _of(MERGE_FOLDER.format("1e42"), MERGE_FOLDER.format(1), "out", fails=True),
    "patch": _of("patch base once -o out", "patch base twice -o out", "out"),
    "patch, folded": _of("patch base once.patch twice.patch --fold -o out", "patch base once -o out", "out"),
    "patch of SkyRL": _of("patch base once --to skyrl --step 1 -o out", "merge base adapter -o out", "out"),
    "apply, folder": _of("apply base once.patch twice.patch -o out", MERGE_FOLDER.format(1), "out"),
    "apply, folder, back": _of("apply once once.patch --reverse -o out", MERGE_FOLDER.format(1), "out"),
    "apply, file": _of("apply base.safetensors file.patch -o out.safetensors", MERGE_FILE.format(1), "out.safetensors"),
    "unmerge, folder": _of("unmerge once adapter -o out", MERGE_FOLDER.format(1), "out"),
    "unmerge, file": _of(
        "unmerge once.safetensors adapter -o out.safetensors", MERGE_FILE.format(1), "out.safetensors"
    ),
    "unmerge, file, second": _of(
        "unmerge twice.safetensors adapter:0.5 -o out.safetensors",
        "merge twice.safetensors adapter:0.3 -o out.safetensors",
        "out.safetensors",
    ),
    "extract, folder": _of("extract base once --rank 2 -o out", "extract base once --rank 1 -o out", "out"),
    "extract, file, with scratch": _of(
        "extract base once --energy 0.5 -o out.safetensors",
        "extract base once --rank 3 -o out.safetensors",
        "out.safetensors",
    ),
    "extract, kohya": _of(
        "extract sdxl.safetensors tuned.safetensors --rank 2 -o out.safetensors",
        "extract sdxl.safetensors tuned.safetensors --rank 1 -o out.safetensors",
        "out.safetensors",
    ),
    "convert, adapter, folder": _of("convert adapter --to mlx -o out", "convert adapter --to peft -o out", "out"),
    "convert, adapter, file": _of(
        "convert adapter --to peft -o out.safetensors", "convert other --to peft -o out.safetensors", "out.safetensors"
    ),
    "convert, adapter, GGUF": _of(
        "convert llama --to gguf --base base.gguf -o out.gguf",
        "convert other-llama --to gguf --base base.gguf -o out.gguf",
        "out.gguf",
    ),
    "convert, adapter, Ollama": _of(
        "convert llama --for ollama --base base.gguf -o out", "convert adapter --to peft -o out", "out"
    ),
    "convert, checkpoint, folder": _of("convert base --dtype bf16 -o out", "convert base --dtype fp16 -o out", "out"),
    "convert, checkpoint, file": _of(
        "convert base.bin -o out.safetensors", "convert base.bin --dtype bf16 -o out.safetensors", "out.safetensors"
    ),
    "convert, checkpoint, over a merge": _of(
        "convert base.bin -o out.safetensors", MERGE_FILE.format(1), "out.safetensors"
    ),
    "convert, torch file": _of(
        "convert base.safetensors --to torch -o out.bin", "convert base.gguf --to torch -o out.bin", "out.bin"
    ),
    "convert, metadata": _of(
        "convert base.safetensors --set title=a -o out.safetensors",
        "convert base.safetensors --set title=b -o out.safetensors",
        "out.safetensors",
    ),
    "combine": _of("combine adapter:0.7 other:0.3 -o out", "combine adapter:0.1 other:0.3 -o out", "out"),
    "resize": _of("resize adapter --rank 1 -o out", "resize adapter --rank 3 -o out", "out"),
    "init": _of("init base --rank 2 --target q_proj -o out", "init base --rank 1 --target q_proj -o out", "out"),
    "init with residual": _of(PISSA.format(1), PISSA.format(2), "residual", "out"),
    "save a recipe": _of(
        "resize adapter --rank 1 -o out --save-recipe out.json",
        "resize adapter --rank 3 -o out --save-recipe out.json",
        "out",
        "out.json",
    ),
    "merge with a page": _of(
        "merge base adapter:0.5 -o out --html out.html", "merge base adapter -o out --html out.html", "out", "out.html"
    ),
    "a page alone": _of(
        "resize adapter --rank 1 --dry-run --html out.html", "inspect adapter --html out.html", "out.html"
    ),
    "demo": _of("demo out", "demo base/../out", "out"),  # whose adapters name their bases in another way
    "run a recipe": _of("run recipe.json", "run former.json", "out", "next"),
}


@dataclass(frozen=True)
class Before:
    """What is there before a run.

    Attributes:
        is_old: whether the old output is.
        killed: the share of a run's calls after which it was killed; None if none was.
        links: whether files can have second names.
    """

    is_old: bool
    killed: float | None = None
    links: bool = True


BEFORE = {
    "nothing": Before(False),
    "old": Before(True),
    "old, no links": Before(True, None, False),
    "old, leftovers": Before(True, 0.5),
    "old, late leftovers": Before(True, 0.85),
}


def call(command: str, *flags: str) -> tuple[int, str]:
    """Run a command of the table and return its exit code and what it said."""
    result = run_command(*command.split(), *flags)
    return result.exit_code, result.stderr


def make_stage(folder: Path) -> None:
    """Make the inputs of all scenarios."""
    folder.mkdir()
    layer = "model.layers.0.self_attn"
    tensors = {
        f"{layer}.{name}.weight": weights(8, 6, seed=seed, dtype=torch.bfloat16)
        for seed, name in enumerate(("q_proj", "k_proj"))
    }
    write_model(folder / "base", tensors, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, shards=2)
    (folder / "base" / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "base.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "base.bin")
    for seed, name in enumerate(("adapter", "other")):
        write_peft(folder / name, {f"{layer}.q_proj": factors(8, 6, 3, seed)}, base_model_name_or_path="base")
    write_llama(folder / "base.gguf", llama_weights(), dtype="BF16")
    width = llama_weights()[f"{layer}.q_proj.weight"].shape
    for seed, name in enumerate(("llama", "other-llama")):
        write_peft(folder / name, {f"{layer}.q_proj": factors(*width, 2, seed)}, base_model_name_or_path="base")
    _make_image_models(folder)
    (folder / "notes.txt").write_text("a user's file")
    for name, base in {"recipe.json": "adapter", "former.json": "other"}.items():
        steps = [
            {"command": "merge", "base": "base", "adapters": [base], "out": "out"},
            {"command": "resize", "adapter": base, "rank": 1, "out": "next"},
        ]
        (folder / name).write_text(json.dumps({"steps": steps}))
    os.chdir(folder)
    for ending in ("", ".safetensors"):
        done(f"merge base{ending} adapter -o once{ending}")
        done(f"merge once{ending} adapter:0.5 -o twice{ending}")
    done("patch base once -o once.patch")
    done("patch once twice -o twice.patch")
    done("patch base.safetensors once.safetensors -o file.patch")


def done(command: str) -> None:
    """Run a command that succeeds."""
    code, said = call(command)
    assert code == 0, f"{command}: {said}"


def _make_image_models(folder: Path) -> None:
    """Make a pipeline of diffusers, whose weights are in folders of its folder, and a fine-tune of an image model."""
    pipeline(folder / "pipe")
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    A, B = factors(8, 8, 2)
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, folder / "unet.safetensors")
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    save_file(base := load_file(FIXTURES / "sdxl" / "base.safetensors"), folder / "sdxl.safetensors")
    W = base[name]
    A, B = factors(*W.shape, 2)
    save_file({**base, name: (W.float() + B @ A).to(W.dtype)}, folder / "tuned.safetensors")


def files_of(folder: Path) -> Files:
    """Return all files below a folder."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder)] = content_of(path)
        if not files and not folders and place != str(folder):
            found[os.path.relpath(place, folder)] = b"/"
    return found


def content_of(path: str | Path) -> bytes:
    """Return a file's bytes; those of a page as if its run began anew: the call in it says if it did not."""
    with open(path, "rb") as file:
        data = file.read()
    return data.replace(b" --resume<", b"<") if str(path).endswith(".html") else data


def put(folder: Path, files: Files, links: bool = True) -> None:
    """Make a folder hold these files and nothing else; what was set aside is a second name of the same file.

    All are as old, so that a journal knows the inputs again.
    """
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, data in sorted(files.items()):
        path, place = folder / name, name.removesuffix(".loratool-former")
        path.parent.mkdir(parents=True, exist_ok=True)
        if data == b"/":
            path.mkdir()
        elif links and place != name and files.get(place) == data:
            path.hardlink_to(folder / place)
        else:
            path.write_bytes(data)
            os.utime(path, (0, 0))
