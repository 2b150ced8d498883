"""Commands without an import of torch, which takes longer than a small merge."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, load_model, write_model
from lib.files import imatrix_files
from lib.files.ggml_blocks import blocks_of
from lib.files.gguf_bytes import floats, tensor, write
from lib.files.lycoris_files import KINDS, PEFT_KINDS, base_of, peft_of, roles_of, write_lycoris
from lib.models.coded_models import LIKE, REPRESENTATIVES, numbers_of, sized, write_adapter, write_base, write_twins
from lib.models.converted_sources import IMAGE, LANGUAGE, write_image
from lib.models.gguf_models import llama_weights, write_llama
from lib.oracles.matrix import READABLE

from loratool.adapters.formats import FORMATS, written_formats
from loratool.architectures.runtimes.table import RUNTIMES
from loratool.commands.choices import QKV_LAYOUTS
from loratool.commands.combine.methods.table import METHODS, NOT_COMPRESSED
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES
from loratool.files.output.output import CONTAINERS

LLAMA, GPT2, SDXL = (FIXTURES / name for name in ("llama", "gpt2", "sdxl"))

# Runs the commands of a JSON list on stdin; prints the exit code of each with the places in loratool that import torch
BLOCKED = """
import json, sys, traceback
places = []
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            frames = [f for f in traceback.extract_stack() if "/loratool/" in f.filename]
            places.append([f"{f.filename}:{f.lineno}" for f in frames[-3:]])
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, NoTorch())
from loratool.cli import _run
results = []
for argv in json.loads(sys.stdin.read()):
    results.append([argv, _run(argv), places[:]])
    places.clear()
print(json.dumps(results))
"""


def run_without_torch(*commands: tuple[object, ...]) -> list[tuple[list[str], int, list[list[str]]]]:
    """Run commands in one process that cannot import torch: each with its exit code and where it imports torch."""
    listed = json.dumps([[str(word) for word in argv] for argv in commands])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", BLOCKED]
    done = subprocess.run(run, input=listed, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results: list[tuple[list[str], int, list[list[str]]]] = json.loads(done.stdout.splitlines()[-1])
    return results


def there_and_back(folder: Path, base: Path, adapter: Path, *options: str) -> list[tuple[object, ...]]:
    """The commands that merge, verify and undo."""
    folder.mkdir()
    out, back = (folder / f"{word}{base.suffix}" for word in ("out", "back"))
    return [
        ("merge", base, adapter, "-o", out, *options),
        ("verify", base, adapter, out),
        ("unmerge", out, adapter, "-o", back),
    ]


def test_no_import_of_torch(tmp_path: Path) -> None:
    base, adapter, tuned = (LLAMA / name for name in ("base", "adapter", "tuned"))
    image = SDXL / "base.safetensors"
    pickled, rounded = tmp_path / "pickled", tmp_path / "rounded"
    pickled.mkdir()
    torch.save(load_model(base), pickled / "pytorch_model.bin")
    shutil.copy(base / "config.json", pickled)
    write_model(rounded, with_rounded_change(base, adapter), json.loads((base / "config.json").read_text()))
    results = run_without_torch(
        *there_and_back(tmp_path / "shards", base, adapter),
        *there_and_back(tmp_path / "codes", LLAMA / "fp8", adapter),
        *there_and_back(tmp_path / "requantized", LLAMA / "fp8", adapter, "--quantized", "requantize"),
        *there_and_back(tmp_path / "folder", GPT2 / "base", GPT2 / "adapter"),
        *there_and_back(tmp_path / "file", image, SDXL / "adapter.safetensors"),
        *there_and_back(tmp_path / "pickle", pickled, adapter),
        ("verify", base, adapter, rounded),
        ("inspect", base),
        ("inspect", adapter, "--base", base),
        ("count", base, "--rank", "8"),
        ("diff", base, rounded),
        ("convert", base, "--dtype", "fp32", "-o", tmp_path / "wide"),
        ("extract", base, tuned, "-o", tmp_path / "extracted"),
        ("extract", base, tuned, "-o", tmp_path / "kept", "--energy", "0.9", "--dtype", "bf16", "--to", "mlx"),
        ("extract", LLAMA / "fp8", tuned, "-o", tmp_path / "decoded", "--params", "4K", "--certify"),
        ("extract", image, tmp_path / "file" / "out.safetensors", "-o", tmp_path / "image.safetensors"),
        *(("init", base, "-o", tmp_path / method, "--method", method, "--dora") for method in ("lora", "orthogonal")),
        *(init_with_residual(tmp_path, base, method) for method in ("pissa", "milora", "olora")),
        ("init", image, "-o", tmp_path / "new.safetensors", "--method", "gaussian", "--dora"),
        ("init", base, "-o", tmp_path / "mica", "--method", "mica"),
        ("verify", base, adapter, tuned),
    )
    for argv, code, places in results:
        assert not places, argv
        assert code == (argv[-1] == str(tuned)), argv


def init_with_residual(folder: Path, base: Path, method: str) -> tuple[object, ...]:
    return "init", base, "-o", folder / method, "--method", method, "--residual", folder / f"{method}-residual"


def require_done(*commands: tuple[object, ...]) -> None:
    for argv, code, places in run_without_torch(*commands):
        assert not places and code == 0, (argv, places)


@pytest.mark.slow
def test_what_is_computed_from_factors(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    base, tuned, adapter, style = (demo / name for name in ("base", "tuned", "adapter", "style"))
    image = demo / "sdxl" / "adapter.safetensors"
    imatrix = imatrix_files.write_gguf(tmp_path / "imatrix.gguf", {"blk.0.attn_q.weight": ([*range(1, 65)], [1])})
    combine = ("combine", adapter, style, "--force", "-o", tmp_path / "combined")
    resize = ("resize", adapter, "--force", "-o", tmp_path / "resized")
    require_done(
        ("demo", demo),
        ("env",),
        *((*combine, "--method", method) for method in METHODS),
        *((*combine, "--method", method, "--rank", "6") for method in METHODS if method not in NOT_COMPRESSED),
        (*combine, "--energy", "0.9", "--dtype", "fp16", "--imatrix", imatrix),
        (*combine, "--to", "mlx", "--dry-run"),
        ("combine", image, f"{image}:0.5", "-o", tmp_path / "combined.safetensors", "--params", "10K"),
        (*resize, "--rank", "4", "--dtype", "bf16"),
        (*resize, "--energy", "0.9", "--imatrix", imatrix),
        (*resize, "--rank-rule", "noise=1"),
        ("resize", image, "--size", "8KB", "--to", "diffusers", "-o", tmp_path / "resized.safetensors"),
        ("diff", adapter, style, "--base", base),
        ("diff", adapter, style, tmp_path / "resized"),
        ("diff", image, tmp_path / "combined.safetensors"),
        ("diff", base, tuned, "--spectra"),
        ("diff", base, tuned, "--headers"),
        ("inspect", adapter, "--spectra"),
        ("inspect", adapter, "--spectra", "--base", base),
        ("inspect", base, "--spectra"),
    )


@pytest.mark.slow
def test_codes_of_each_format(tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = []
    for vector in REPRESENTATIVES:
        folder = tmp_path / vector
        base = write_base(vector, folder / "base")
        if not (matrices := sized(numbers_of(base))):
            commands.append(("inspect", base))
            continue
        adapter, _ = write_adapter(folder / "adapter", matrices, 1e4)
        commands += there_and_back(folder / "mixed", base, adapter)
        commands += there_and_back(folder / "codes", base, adapter, "--quantized", "requantize", "--allow", "lossy")
        commands += [("inspect", base), ("diff", base, folder / "mixed" / "out")]
        commands += [("convert", base, "--dtype", "fp32", "-o", folder / "plain")]
    require_done(*commands)


@pytest.mark.slow
def test_codes_with_new_scales(tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = []
    for vector in LIKE:
        base, adapter, quantized = write_twins(vector, tmp_path / vector)
        out = tmp_path / vector / "out"
        commands.append(("merge", base, adapter, "--like", quantized, "--no-undo", "-o", out))
        commands.append(("verify", base, adapter, out))
    require_done(*commands)


GGUF = "blk.0.ffn_up.weight"


def write_gguf(path: Path, kind: str | None) -> Path:
    """A GGUF file of one matrix, in F16 or in a type of blocks."""
    numbers = torch.linspace(-1, 1, 3 * 256).reshape(3, 256).numpy()
    matrix = floats(numbers, "F16")
    if kind:
        matrix = tensor(GGML_TYPES[kind][0], (3, 256), blocks_of(kind, 768 // BLOCK_TYPES[kind][0]).tobytes())
    return write(path, {"general.architecture": "llama", "llama.block_count": 1}, {GGUF: matrix})


@pytest.mark.slow
def test_gguf_models(tmp_path: Path) -> None:
    A, B = torch.linspace(0.1, 1, 512).reshape(2, 256), torch.linspace(-1, 1, 6).reshape(3, 2)
    fields = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    pair = {f"{GGUF}.lora_a": floats(A.numpy()), f"{GGUF}.lora_b": floats(B.numpy())}
    adapter = write(tmp_path / "lora.gguf", {**fields, "adapter.lora.alpha": 2.0}, pair)
    plain, commands = write_gguf(tmp_path / "plain.gguf", None), list[tuple[object, ...]]()
    for kind in ("Q8_0", "Q4_1", "Q4_K", "Q6_K", "MXFP4", "TQ1_0"):
        base = write_gguf(tmp_path / f"{kind}.gguf", kind)
        commands += there_and_back(tmp_path / kind, base, adapter, "--dtype", "bf16")
        if kind in ("Q8_0", "Q4_1"):
            out = tmp_path / f"like-{kind}.gguf"
            commands += [("merge", plain, adapter, "--like", base, "--no-undo", "-o", out)]
            commands += [("verify", plain, adapter, out), ("inspect", out)]
    for dtype in ("BF16", "F32"):
        llama = write_llama(tmp_path / f"llama-{dtype}.gguf", llama_weights(), dtype)
        commands += [("convert", llama, "-o", tmp_path / dtype), ("diff", llama, tmp_path / dtype)]
    require_done(*commands)


# What files of a format do not say
ASKED = {"loralib": ("--alpha", 2), "loralib, MergedLinear": ("--alpha", 2, "--enable-lora", "1,0,1")}

PLAIN = ("--to", "peft", "--plain", "--rank", "2")
WITH_BASE = (
    ("--to", "peft", "--dtype", "fp16"),
    *(("--to", "peft", "--layout", layout) for layout in QKV_LAYOUTS),
    ("--to", "peft", "--architecture", "LlamaModel"),
    *(("--for", runtime) for runtime in RUNTIMES),
)


def converted(folder: Path, cases: Iterable[tuple[str, Path, tuple[str, ...]]]) -> set[tuple[str, tuple[str, ...]]]:
    """Return the names and options of what was converted. What was refused imported no torch either.

    Args:
        cases: name, adapter and options.
    """
    commands = dict[tuple[str, tuple[str, ...]], tuple[object, ...]]()
    for name, adapter, options in cases:
        suffix = ".gguf" if {"gguf", "llama.cpp"} & {*options} else ".safetensors" if "--for" not in options else ""
        out = folder / f"out{len(commands)}{suffix}"
        commands[name, options] = "convert", adapter, *options, *ASKED.get(name, ()), "-o", out
    done = set()
    for case, (argv, code, places) in zip(commands, run_without_torch(*commands.values()), strict=True):
        assert not places and code in (0, 2, 3, 4), (argv, places)
        done |= set() if code else {case}
    return done


@pytest.mark.slow
def test_adapters_of_each_format_to_each(tmp_path: Path) -> None:
    sources = {name: make(tmp_path / re.sub(r"\W", "", name)) for name, make in READABLE.items()}
    options = [("--to", to) for to in written_formats()]
    done = converted(tmp_path, [(*source, words) for source in sources.items() for words in options])
    assert {name for name, _ in done} == {*READABLE} and {words for _, words in done} == {*options}


@pytest.mark.slow
def test_language_models_adapters_of_each_kind(tmp_path: Path) -> None:
    cases: list[tuple[str, Path, tuple[str, ...]]] = []
    for kind, language in LANGUAGE.items():
        source = language.write(tmp_path / kind)
        base = "--base", str(source.base)
        options = [(*words, *base) for words in WITH_BASE] + [(*PLAIN, *base) if kind == "dora" else PLAIN]
        if kind == "lora":
            before = shutil.copytree(source.adapter, tmp_path / "before")
            options.append((*PLAIN, "--initial", str(before)))
        cases += [(kind, source.adapter, words) for words in options]
    done = converted(tmp_path, cases)
    without_factors = (
        "vera pvera randlora shira supertuning fourierft waveft miss bone beft ia3 boft bat road hira glora".split()
    )
    assert {kind for kind, _ in done} == LANGUAGE.keys() - {*without_factors}
    assert {words[: words.index("--base")] for _, words in done if "--base" in words} == {*WITH_BASE, PLAIN}
    assert any("--initial" in words for _, words in done)


NEED_A_RANK = {"ia3", "lycoris_glora", "oft_blocks"}  # and the base, to become LoRA


@pytest.mark.slow
def test_image_models_adapters_of_each_kind(tmp_path: Path) -> None:
    sources = {kind: write_image(tmp_path / kind.replace(" ", ""), "sdxl", kind).adapter for kind in IMAGE}
    options = (
        ("--to", "diffusers"),
        ("--to", "kohya", "--dtype", "bf16"),
        ("--to", "diffusers", *PLAIN[2:]),
        ("--to", "peft"),
    )
    done = converted(tmp_path, [(*source, words) for source in sources.items() for words in options])
    assert {kind for kind, _ in done} == IMAGE.keys() - NEED_A_RANK and {words for _, words in done} == {*options}


@pytest.mark.slow
def test_adapters_of_each_kind(tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = []
    for number, (kind, (layer, _)) in enumerate(KINDS.items()):
        base = base_of(layer, torch.bfloat16)
        adapter = write_lycoris(tmp_path / f"{number}.safetensors", {base.path: roles_of(kind, torch.float16)})
        commands += there_and_back(tmp_path / f"{number}", base.write(tmp_path / f"{layer}.safetensors"), adapter)
    for kind in PEFT_KINDS:
        peft = peft_of(kind, torch.float16)
        model = base_of(peft.layer, torch.bfloat16).write(tmp_path / f"{peft.layer}.safetensors")
        commands += there_and_back(tmp_path / f"of {kind}", model, peft.write(tmp_path / kind))
    require_done(*commands)


def test_adapters_of_each_format(tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = []
    for number, make in enumerate(READABLE.values()):
        commands.append(("inspect", make(tmp_path / f"{number}")))
    image = SDXL / "base.safetensors"
    for base, source, formats in (
        (LLAMA / "base", LLAMA / "adapter", ("mlx", "gguf")),
        (image, SDXL / "adapter.safetensors", ("kohya", "comfy", "diffusers")),
    ):
        for to in formats:
            adapter = (tmp_path / to).with_suffix(CONTAINERS[FORMATS[to].container][0])
            commands.append(("convert", source, "--to", to, "--base", base, "-o", adapter))
            commands += there_and_back(tmp_path / f"by {to}", base, adapter)
    require_done(*commands)


def with_rounded_change(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The llama fixture merged with the change rounded to bf16 before it is added."""
    tensors, factors = load_model(base), load_model(adapter)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        A, B = (factors[f"base_model.model.{name.replace('.weight', f'.lora_{side}.weight')}"].float() for side in "AB")
        tensors[name] = tensors[name] + (2 * (B @ A)).bfloat16()
    return tensors
