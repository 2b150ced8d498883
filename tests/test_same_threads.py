"""Compare the bytes of every command that writes between numbers of threads and of workers.

BLAS and LAPACK divide a long sum by the number of threads, which rounds it differently. So the matrices are long, and
the ranks are high enough: with less, the bytes are equal even where the code depends on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from conftest import factors, few, weights, write_kohya, write_model, write_peft
from lib.files.imatrix_files import write_binary
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.cli import COMMANDS, cli
from loratool.commands.choices import COMBINE_METHODS
from loratool.commands.init.methods import INITS
from loratool.streaming.threads import restore_threads, set_threads

LONG, SHORT = 4608, 640  # SHORT is above svd.SMALL, so that a truncated SVD has its Krylov space
SHAPES = {"self_attn.q_proj": (LONG, SHORT), "self_attn.v_proj": (LONG, SHORT), "mlp.down_proj": (SHORT, LONG)}
MODULES = {f"model.layers.0.{name}": shape for name, shape in SHAPES.items()}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
FLUX = {"double_blocks_0_img_attn_qkv": (9216, 3072), "double_blocks_0_img_mlp_0": (12288, 3072)}
RESIDUAL = [name for name, method in INITS.items() if method.mutates_base]


def dora(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write an adapter with magnitudes about those of `weights`."""
    tensors = {}
    for module, (A, B) in pairs.items():
        path = f"base_model.model.{module}"
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        tensors[f"{path}.lora_magnitude_vector"] = weights(len(B), seed=5).abs() + 0.02 * A.shape[1] ** 0.5
    write_peft(folder, pairs, use_dora=True)
    save_file(tensors, folder / "adapter_model.safetensors")


def loha(folder: Path, rank: int) -> None:
    """Write PEFT's LoHa, of which LoRA has the rank squared."""
    tensors = {}
    for n, (module, (out, inp)) in enumerate(MODULES.items()):
        for k in (1, 2):
            A, B = factors(out, inp, rank, seed=20 + 2 * n + k)
            tensors[f"base_model.model.{module}.hada_w{k}_a"] = B * 10
            tensors[f"base_model.model.{module}.hada_w{k}_b"] = A
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": rank, "alpha": rank}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    pairs = [
        {name: factors(*shape, 32, seed=10 * seed + n) for n, (name, shape) in enumerate(MODULES.items())}
        for seed in range(3)
    ]
    base = {f"{name}.weight": weights(*shape, seed=n) for n, (name, shape) in enumerate(MODULES.items())}
    write_model(folder / "base", {name: W.bfloat16() for name, W in base.items()}, CONFIG)
    write_model(folder / "wide", base, CONFIG)
    tuned = {f"{name}.weight": base[f"{name}.weight"] + B @ A for name, (A, B) in pairs[0].items()}
    noise = {name: 1e-4 * weights(*W.shape, seed=90 + n) for n, (name, W) in enumerate(tuned.items())}
    write_model(folder / "tuned", {name: W + noise[name] for name, W in tuned.items()}, CONFIG)
    for name, each in zip(("one", "two"), pairs, strict=False):
        write_peft(folder / name, each)
    write_peft(folder / "short", {name: (A.bfloat16(), B.bfloat16()) for name, (A, B) in pairs[2].items()})
    dora(folder / "dora", pairs[2])
    loha(folder / "loha", 6)
    sums = {"attn_q": SHORT, "attn_v": SHORT, "ffn_down": LONG}
    squares = {f"blk.0.{name}.weight": (weights(1, inp, seed=inp).square(), [1.0]) for name, inp in sums.items()}
    write_binary(folder / "imatrix.dat", squares)
    flux = {name: factors(*shape, 16, seed=n) for n, (name, shape) in enumerate(FLUX.items())}
    write_kohya(folder / "flux.safetensors", flux, torch.tensor(16.0))
    loratool.merge(folder / "base", folder / "one", folder / "merged")
    loratool.patch(folder / "base", folder / "merged", folder / "merged.patch")
    return folder


# A command and what of it -> the call; `i` has the inputs, and what is written goes to `out`
CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": lambda i, out: loratool.merge(i / "base", [i / "one", (i / "two", 0.3)], out),
    "merge of DoRA": lambda i, out: loratool.merge(i / "base", i / "dora", out),
    "merge of LoHa": lambda i, out: loratool.merge(i / "wide", i / "loha", out),
    "unmerge": lambda i, out: loratool.unmerge(i / "merged", i / "one", out),
    "unmerge without undo": lambda i, out: loratool.unmerge(i / "merged", i / "one", out, approximate=True),
    "merge in place": lambda i, out: loratool.merge(shutil.copytree(i / "base", out), i / "one", in_place=True),
    "patch": lambda i, out: loratool.patch(i / "base", i / "merged", out.with_suffix(".patch")),
    "apply": lambda i, out: loratool.apply(i / "base", i / "merged.patch", out),
    "extract of a rank": lambda i, out: loratool.extract(i / "wide", i / "tuned", out, rank=8),
    "extract by energy": lambda i, out: loratool.extract(i / "wide", i / "tuned", out, energy=0.9, certify=True),
    "resize to a rank": lambda i, out: loratool.resize(i / "one", out, rank=8),
    "resize by energy": lambda i, out: loratool.resize(i / "short", out, energy=0.9, dtype="bf16"),
    "resize by noise": lambda i, out: loratool.resize(i / "short", out, rank_rule=("noise", 1.0)),
    "resize of LoHa": lambda i, out: loratool.resize(i / "loha", out, rank=8),
    "resize with an imatrix": lambda i, out: loratool.resize(i / "one", out, rank=8, imatrix=i / "imatrix.dat"),
    "resize of an image model": lambda i, out: loratool.resize(
        i / "flux.safetensors", out.with_suffix(".safetensors"), rank=8
    ),
    "resize to another format": lambda i, out: loratool.resize(
        i / "flux.safetensors", out.with_suffix(".safetensors"), rank=8, to="diffusers"
    ),
    "convert a model": lambda i, out: loratool.convert_model(i / "base", out, dtype="fp16"),
    "convert to a rank": lambda i, out: loratool.convert(i / "one", out, to="peft", plain=True, rank=8),
    "convert of DoRA": lambda i, out: loratool.convert(i / "dora", out, to="peft", plain=True, base=i / "base"),
    "convert of LoHa": lambda i, out: loratool.convert(i / "loha", out, to="peft"),
    "convert for a program": lambda i, out: loratool.convert(
        i / "one", out, runtime="vllm", rank=8, base=i / "base", dtype="bf16"
    ),
    "convert of an image model": lambda i, out: loratool.convert(
        i / "flux.safetensors", out.with_suffix(".safetensors"), to="diffusers", plain=True, rank=8
    ),
    **{
        f"init by {method}": lambda i, out, method=method: loratool.init(  # type: ignore[misc]
            i / "base", out, method=method, rank=32, residual=out.with_name("rest") if method in RESIDUAL else None
        )
        for method in INITS
    },
    "init for MLX": lambda i, out: loratool.init(i / "base", out, rank=32, dora=True, to="mlx"),
    "init of DoRA": lambda i, out: loratool.init(i / "base", out, rank=32, dora=True),
    **{
        f"combine by {method}": lambda i, out, method=method: loratool.combine(  # type: ignore[misc]
            [i / "one", (i / "two", 0.3)], out, method=method
        )
        for method in COMBINE_METHODS
    },
    **{
        f"combine by {method} to a rank": lambda i, out, method=method: loratool.combine(  # type: ignore[misc]
            [i / "one", (i / "two", 0.3)], out, method=method, rank=8, rank_method="truncate"
        )
        for method in ("cat", "ties", "knots")
    },
    "combine of kinds": lambda i, out: loratool.combine([i / "one", i / "loha"], out, rank=8),
}
EXAMPLES = [
    "merge",
    "merge of DoRA",
    "unmerge",
    "patch",
    "apply",
    "extract of a rank",
    "resize to a rank",
    "resize with an imatrix",
    "convert a model",
    "convert of DoRA",
    "convert for a program",
    "convert of an image model",
    "init by mica",
    "init of DoRA",
    "combine by ties",
    "combine by cat to a rank",
]
NUMBERS = (1, 2, 4)  # of threads and of workers


@contextmanager
def machine(threads: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give numpy and torch so many threads, and commands so many cores to work on, at small ranks too."""
    before = set_threads(threads)
    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_getaffinity", lambda pid: range(workers), raising=False)
        patched.setattr("loratool.streaming.parallel.LOW_RANK", 0)
        try:
            yield
        finally:
            assert {*set_threads(1).values()} == {threads}
            restore_threads(before)


def digests(call: Callable[[Path, Path], Any], inputs: Path, folder: Path) -> dict[str, str]:
    """Return the digest of each file that a call writes."""
    folder.mkdir()
    call(inputs, folder / "out")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    assert any(name.endswith(".safetensors") for name in files)
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    shutil.rmtree(folder)
    return found


def test_every_command_that_writes_is_called() -> None:
    """But for `run`, whose steps are these commands."""
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in COMMANDS}
    writers = {n for n, each in commands.items() if each and any("--out" in option.opts for option in each.params)}
    assert {name.split()[0] for name in CALLS} == writers


def differing(
    name: str, places: Sequence[tuple[int, int]], inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, int], list[str]]:
    """Return for each (threads, workers) the files that are not as with one thread and one worker."""
    found = {}
    for threads, workers in ((1, 1), *places):
        with machine(threads, workers, monkeypatch):
            found[threads, workers] = digests(CALLS[name], inputs, folder / "here")
    first = found[1, 1]
    assert all(each.keys() == first.keys() for each in found.values())
    return {place: names for place, each in found.items() if (names := [n for n in each if each[n] != first[n]])}


@pytest.mark.parametrize(
    "name",
    few(EXAMPLES, "merge of DoRA", "extract of a rank", "convert of an image model", "init by mica", "combine by ties"),
)
def test_bytes_are_those_of_one_thread(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differing(name, [(4, 2)], inputs, tmp_path, monkeypatch) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_bytes_depend_on_no_number_of_threads_or_workers(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = list(product(NUMBERS, NUMBERS))[1:]
    assert differing(name, places, inputs, tmp_path, monkeypatch) == {}


# A command that computes small products of each module -> the call
SMALL_PRODUCTS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda i, out: loratool.inspect(i / "one"),
    "inspect --spectra": lambda i, out: loratool.spectra(i / "one"),
    "diff": lambda i, out: loratool.diff(i / "one", i / "two"),
    "diff of three": lambda i, out: loratool.diff(i / "one", i / "two", i / "short"),
    "resize": CALLS["resize to a rank"],
    "resize --dry-run": lambda i, out: loratool.resize(i / "one", out, rank=8, dry_run=True),
    "combine": CALLS["combine by cat to a rank"],
}
DECOMPOSITIONS = [(np.linalg, "qr"), (np.linalg, "svd"), *((torch.linalg, name) for name in ("qr", "svd", "svdvals"))]


def watch(monkeypatch: pytest.MonkeyPatch, called: Callable[[], object]) -> None:
    """Call `called` before each decomposition."""
    for module, name in DECOMPOSITIONS:
        original = getattr(module, name)

        def watched(*args: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            called()
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)


@pytest.mark.parametrize("name", [*SMALL_PRODUCTS, "convert to a rank"])
def test_small_products_have_one_thread(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for each other's parts of a small product spin, and on a busy machine they do so for long."""
    threads: list[int] = []

    def note() -> None:
        now = set_threads(1)
        restore_threads(now)
        threads.extend(now.values())

    watch(monkeypatch, note)
    with machine(4, 2, monkeypatch):
        {**SMALL_PRODUCTS, **CALLS}[name](inputs, tmp_path / "out")
    assert threads and {*threads} == {1}


@pytest.mark.parametrize("name", SMALL_PRODUCTS)
def test_workers_compute_small_products(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two decompositions wait for each other: they are of two modules, in two threads."""
    both, first_two = threading.Barrier(2), iter(range(2))

    def meet() -> None:
        if next(first_two, None) is not None:
            both.wait(timeout=30)

    watch(monkeypatch, meet)
    with machine(1, 2, monkeypatch):
        SMALL_PRODUCTS[name](inputs, tmp_path / "out")
    assert not both.broken and next(first_two, None) is None
