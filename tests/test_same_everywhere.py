"""Hold the bytes of merges of every kind against one table, here and where processes compute differently.

`python tests/test_same_everywhere.py --write` prints the table anew: it changes only with the version of the arithmetic
or of the undo file. The fixture's numbers come from hashes and integers, never from a random generator of torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import few, needs_passes
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
TYPES["e4m3"] = torch.float8_e4m3fn
PREFIX = "base_model.model."
CASTS = {"bf16": "fp16 fp32", "fp16": "bf16 fp32", "fp32": "bf16 fp16"}
LORA = {"linear": (24, 40), "Conv1D": (40, 24), "conv": (12, 6, 3, 2)}  # module -> the shape of its weight
EMBEDDING = (50, 16)  # (vocabulary, dimension)

# name of a merge -> the first digits of the sha256 of its weights and of its undo file
TABLE = {
    "gpt2 fp32": "1f8c5cc6f1bf7408 e669930cfecbadfb",
    "llama bf16": "b65b04d7b054516c a82c24eaa2e5dc55",
    "lora bf16": "35fdcad875e13b38 beb64fdb81b5d662",
    "lora bf16 to fp16": "335d06dfe762164c e3b0c44298fc1c14",
    "lora bf16 to fp32": "bfc7cde389bb7ed3 e3b0c44298fc1c14",
    "two bf16": "2138c2cc9b0337c0 3d3d53bc2b6850de",
    "dora bf16": "967e869645e28ed3 9a7e1447effb24e9",
    "dora and lora bf16": "aa8237daeabc6399 c18940d4279dc22d",
    "values bf16": "109fcb80f8c43de2 f9d1912b67c77ce4",
    "half values bf16": "03821febfcfad4d6 1fe7c4744491117d",
    "experts bf16": "c38f4f56774a1a26 6ee05313ac15ee6f",
    "norms bf16": "23b4d7b32ca074d3 efdc7bcdfed90ba2",
    "wide bf16": "8291cfce4938b887 58c568822771ecab",
    "sdxl bf16": "f26d885cbe0aaa27 b5cb50314d5e7be8",
    "lora fp16": "1d5b8d3e06066053 b7987b8c20348295",
    "lora fp16 to bf16": "dab4ff53a4640012 e3b0c44298fc1c14",
    "lora fp16 to fp32": "6e3169d248c89446 e3b0c44298fc1c14",
    "two fp16": "801c24bdb237eb8f 58b007cf8306e5d2",
    "dora fp16": "129759139f3d060a dd345789ef785a7c",
    "dora and lora fp16": "b231c573d41ccd43 13f27aa1914f98c8",
    "values fp16": "2b14a4f0a7ca9487 eab27ee3116671c1",
    "half values fp16": "1908a0143e2ec5a4 88f21ca659f55f7d",
    "experts fp16": "503dcf2d0537cf27 547a79e183011abd",
    "norms fp16": "1d4cb1fc83cceced 973d87b62e7d14f2",
    "wide fp16": "b4f3a37429ba721a 58740d37924b10a7",
    "sdxl fp16": "327a7afd77d37183 ac43e6333183b69d",
    "lora fp32": "0fbf85842e97902c 83e23f60c3925163",
    "lora fp32 to bf16": "22ee664d3bb90a71 e3b0c44298fc1c14",
    "lora fp32 to fp16": "3008d91f5ba03891 e3b0c44298fc1c14",
    "two fp32": "dac1320b2a12ec02 554458286fc1b1ac",
    "dora fp32": "8df5e4fe282d824d ff76db362114bb2f",
    "dora and lora fp32": "6d41d1f8dd9864ef 5dacfb8e4460f57b",
    "values fp32": "88aa0d6ca0927426 65448fd8e277a116",
    "half values fp32": "59c92795bb4ebc31 d002686c2c44730c",
    "experts fp32": "5587f732de23bf67 9bcaaa5127a3e80e",
    "norms fp32": "58596827eadeecbc 262247d6bf8a57a5",
    "wide fp32": "15b15955d2711924 1dcfb39a77f6ee81",
    "sdxl fp32": "d7fcd238657e0876 1d3e67e80efc1f88",
    "lora fp64": "3f13aaa1f5d90f61 89726e8177ed5cb6",
    "two fp64": "1e5e8bf4122d55d4 432d537dc5722bfd",
    "dora fp64": "52ef74ec044e0e1a 04f04237ac4f4ba5",
    "dora and lora fp64": "e2881125db475033 2c35d66e26d07b83",
    "values fp64": "e7bf5ee928dbe46b 3dca13ac0b5a17c7",
    "half values fp64": "e5d1c4b699462515 a3a2d5109f6445df",
    "experts fp64": "c297e4417a1ec1c1 825b429b11ab2052",
    "norms fp64": "2fc36140dd80baf6 80ac7c7ec4884f7a",
    "sdxl fp64": "206d7415f71a61a2 f56bb664837af303",
    "lora e4m3": "eaaf133bac392403 321a858265bfeb1f",
    "two e4m3": "e6ef0b0a149de9da a4462206fd265ff4",
    "dora e4m3": "f425df160c7f0c24 aa2692014d9a481c",
    "dora and lora e4m3": "7d6e4ba30698dd2d ea6e51084d4d862e",
    "values e4m3": "3ed645dfe96b2e32 1569788e3e162e4b",
    "half values e4m3": "5765ffa3b849d69d b0b797e901e6a2da",
    "experts e4m3": "94942933fb03310d 35f1a7293165ea1d",
    "norms e4m3": "9a77a3992f3ed6c2 7958ba66909bd7fc",
    "wide e4m3": "140d507debd561fc f07f6610e1a2e7ac",
    "sdxl e4m3": "8fe4303fd4bda9d6 9d6768f39c01e0c5",
    "fp8 mixed": "eaaa2cdc95b870a9 8e3da2e9752eb878",
    "fp8 requantize": "417fbe35f5dca123 fb4a2127e775fef5",
    "fp8 like": "ca2c935eb8c4cfd0 e3b0c44298fc1c14",
    "bnb_nf4_nested mixed": "9518a7f587d12703 9c7367161de5448c",
    "bnb_nf4_nested like": "20148ef6dd79a31e e3b0c44298fc1c14",
    "ct_pack4_group_asym mixed": "b0747c3ca7532b39 e32f9a1b5dd0cbbc",
    "ct_pack4_group_asym requantize": "83e051ca94ea2899 5445969b5e4d073f",
    "ct_pack4_group_asym like": "0036dee91a38b3c3 e3b0c44298fc1c14",
    "ct_fp8_tensor requantize": "ad28e887b2708a3a 2c84dd5e55e58080",
    "ct_fp8_tensor like": "eb870fb5504cd966 e3b0c44298fc1c14",
    "mlx_affine5_64 mixed": "f1bc9b0a37760a49 bbb3dffe472b3cd1",
    "mlx_affine5_64 like": "09e971c80f6474fc e3b0c44298fc1c14",
    "mxfp4_gpt_oss requantize": "869d8a5cfe8a6abc 4389d1ba8fc2d465",
    "gptq_v1_4bit_act_order mixed": "2e2cb5116ff02b75 d790db995894e612",
    "gptq_v1_4bit_act_order requantize": "a0fe46cfe3fb37e8 aa850623bf4860cb",
    "awq_gemm mixed": "16fa9fe505d2402a 874bd6534c619849",
    "awq_gemm requantize": "f5aedf0a03216176 d668abbed5a45c0a",
}


def numbers(name: str, shape: Sequence[int], size: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers between -size and size that depend on the name only."""
    data = hashlib.shake_256(name.encode()).digest(8 * math.prod(shape))
    found = np.frombuffer(data, "<i8").astype(np.float64) * (size * 2.0**-63)
    # to 16 bits by way of float32, as processors cast from float64 in one rounding or two
    return torch.from_numpy(found).reshape(tuple(shape)).to(torch.float32 if dtype.itemsize <= 2 else dtype).to(dtype)


def weight(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a weight, at the start of each row 0.0, -0.0 and subnormal numbers."""
    W = numbers(name, shape, 0.05, dtype)
    rows = W.view(len(W), -1)
    least = torch.from_numpy(np.arange(2 * len(W)).reshape(-1, 2) % 50 + 1)
    least = least.to({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)
    rows[:, 0], rows[:, 1], rows[:, 2:4] = 0.0, -0.0, least
    return W


def factors(name: str, shape: Sequence[int], rank: int, dtype: torch.dtype, transposed: bool = False) -> list[Tensor]:
    """Return [A, B] for a weight of a shape (out, in, ...), or (in, out) if `transposed`."""
    out, *inside = shape[::-1] if transposed else shape
    A = numbers(f"{name} A", (rank, *inside), 0.3, dtype)
    return [A, numbers(f"{name} B", (out, rank, *[1] * (len(inside) - 1)), 0.02, dtype)]


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file({PREFIX + name: x.contiguous() for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 6, "lora_alpha": 2, **config}))
    return folder


def write_lora(folder: Path, seed: int, dtype: torch.dtype, bias: bool = False, dora: bool = False) -> Path:
    """Write an adapter of every layout: scale 1/3, (out, in), (in, out), a convolution and an embedding."""
    tensors = {}
    for module, shape in {**LORA, "embed": EMBEDDING}.items():
        transposed, embedding = module in ("Conv1D", "embed"), module == "embed"
        A, B = factors(f"{seed} {module}", shape, 6, dtype, transposed)
        tensors[f"{module}.lora_embedding_A" if embedding else f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_embedding_B" if embedding else f"{module}.lora_B.weight"] = B
        if dora:
            magnitude = numbers(f"{seed} {module} m", (len(B),), 0.5, dtype).abs()
            tensors[f"{module}.lora_magnitude_vector"] = magnitude
    if bias:
        tensors["linear.lora_B.bias"] = numbers(f"{seed} bias", (24,), 0.01, dtype)
    return write_adapter(folder, tensors, lora_bias=bias, use_dora=dora)


def write_values(folder: Path) -> Path:
    """Write an adapter of new values: a norm of modules_to_save, a bias and rows of the vocabulary."""
    tensors = {
        "norm.weight": numbers("new norm", (24,), 2.0, torch.float32),
        "linear.bias": numbers("new bias", (24,), 0.1, torch.float32),
        "embed.token_adapter.trainable_tokens_delta": numbers("tokens", (3, 16), 0.1, torch.float32),
    }
    return write_adapter(folder, tensors, modules_to_save=["norm"], trainable_token_indices={"embed": [7, 0, 49]})


# vectors of fixtures/coded -> the ways to write them: formats that differ in packing, in scales and in their rounding
CODED = {
    "bnb_nf4_nested": "mixed like",
    "ct_pack4_group_asym": "mixed requantize like",
    "ct_fp8_tensor": "requantize like",
    "mlx_affine5_64": "mixed like",
    "mxfp4_gpt_oss": "requantize",
    "gptq_v1_4bit_act_order": "mixed requantize",
    "awq_gemm": "mixed requantize",
}


def write_coded(folder: Path, vector: str, known: Mapping[str, Any]) -> tuple[Path, Path, Path]:
    """Return a quantized model that stores what a vector does, its 16-bit original (of other numbers), and an adapter.

    The adapter is for the first of the vector's weights, the one without extremes.
    """
    base, original = folder / vector, folder / f"{vector} original"
    base.mkdir()
    original.mkdir()
    shutil.copy(FIXTURES / "coded" / known["file"], base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **known["config"]}))
    shapes = {name: weight["shape"] for name, weight in known["weights"].items()}
    plain = {name: numbers(name, shape, 0.05, torch.bfloat16) for name, shape in shapes.items()}
    beside = {name: x for name, x in load_file(base / "model.safetensors").items() if name.endswith("_bias")}
    save_file(plain | beside, original / "model.safetensors")
    (original / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    name, shape = next(iter(shapes.items()))
    if len(shape) > 2:
        tensors, config = experts_of(name.rpartition(".")[0], shape), {"target_parameters": [name.rpartition(".")[2]]}
        return base, original, write_adapter(folder / f"{vector} adapter", tensors, **config, peft_version="0.19.0")
    A, B = factors(vector, shape, 6, torch.float32)
    module = name.removesuffix(".weight")
    tensors = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    return base, original, write_adapter(folder / f"{vector} adapter", tensors)


def experts_of(module: str, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return the LoRA of a stack, (experts, in, out)."""
    experts, inside, outside = shape
    A = numbers(f"{module} A", (6 * experts, inside), 0.3, torch.float32)
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": numbers("B", (outside, 6 * experts), 0.02)}


def write_fixture(folder: Path) -> dict[str, Any]:
    """Write all inputs below `folder`, and as `merges.json` what is returned.

    Returns:
        name of a merge -> (base, adapters with weights), and options if it has some.
    """
    single, bf16 = torch.float32, torch.bfloat16
    one, other = (write_lora(folder / f"lora{seed}", seed, dtype, True) for seed, dtype in enumerate((single, bf16)))
    scaled = write_lora(folder / "dora", 2, single, dora=True)
    values = write_values(folder / "values")
    stacks = [(f"model.layers.{i}.mlp.experts", shape) for i, shape in enumerate([(3, 10, 14), (3, 14, 10)])]
    tensors = {}
    for name, _ in stacks:  # the second base stores (experts, in, out)
        tensors[f"{name}.lora_A.weight"] = numbers(f"{name} A", (18, 14), 0.3, single)
        tensors[f"{name}.lora_B.weight"] = numbers(f"{name} B", (10, 18), 0.02, single)
    experts = write_adapter(
        folder / "experts",
        tensors,
        target_parameters=["mlp.experts.down_proj"],
        target_modules=[],
        peft_version="0.19.0",
    )
    A, B = factors("wide", (256, 4096), 64, single)  # large enough for a matrix product to be split
    wide = write_adapter(folder / "wide", {"x.lora_A.weight": A, "x.lora_B.weight": B}, r=64, lora_alpha=64 / 3)
    A, B = factors("tall", (3000, 8), 2, single)  # with many norms
    tall = write_adapter(
        folder / "tall",
        {
            "x.lora_A.weight": A,
            "x.lora_B.weight": B,
            "x.lora_magnitude_vector": numbers("tall m", (3000,), 0.5, single).abs(),
        },
        r=2,
        use_dora=True,
    )
    image = FIXTURES / "sdxl" / "adapter.safetensors"
    merges: dict[str, Any] = {
        "gpt2 fp32": (FIXTURES / "gpt2" / "base", [(FIXTURES / "gpt2" / "adapter", 1.0)]),
        "llama bf16": (FIXTURES / "llama" / "base", [(FIXTURES / "llama" / "adapter", 1.0)]),
    }
    for name, dtype in TYPES.items():
        layers = {f"{module}.weight": weight(module, shape, dtype) for module, shape in LORA.items()}
        layers |= {"embed.weight": weight("embed", EMBEDDING, dtype), "linear.bias": numbers("bias", (24,), 0.1, dtype)}
        base = folder / f"{name}.safetensors"
        save_file({**layers, "norm.weight": numbers("norm", (24,), 2.0, dtype)}, base)
        merges[f"lora {name}"] = base, [(one, 1.0)]
        for to in CASTS.get(name, "").split():
            merges[f"lora {name} to {to}"] = base, [(one, 1.0)], {"dtype": to, "undo": False}
        merges[f"two {name}"] = base, [(one, 1 / 3), (other, -0.7)]
        merges[f"dora {name}"] = base, [(scaled, 1.0)]
        merges[f"dora and lora {name}"] = base, [(scaled, 0.5), (other, -0.7)]
        merges[f"values {name}"] = base, [(values, 1.0)]
        merges[f"half values {name}"] = base, [(values, 0.5)]
        moe = folder / f"experts {name}"
        moe.mkdir()
        (moe / "config.json").write_text('{"model_type": "mixtral"}')
        save_file({f"{n}.down_proj": weight(n, shape, dtype) for n, shape in stacks}, moe / "model.safetensors")
        merges[f"experts {name}"] = moe, [(experts, 1 / 3)]
        save_file({"x.weight": weight("tall", (3000, 8), dtype)}, folder / f"tall {name}.safetensors")
        merges[f"norms {name}"] = folder / f"tall {name}.safetensors", [(tall, 1.0)]
        if name != "fp64":  # whose every sum is decided by itself, which takes long for a million
            save_file({"x.weight": weight("wide", (256, 4096), dtype)}, folder / f"wide {name}.safetensors")
            merges[f"wide {name}"] = folder / f"wide {name}.safetensors", [(wide, 1.0)]
        pictures = {k: v.to(dtype) for k, v in load_file(FIXTURES / "sdxl" / "base.safetensors").items()}
        save_file(pictures, folder / f"sdxl {name}.safetensors")
        merges[f"sdxl {name}"] = folder / f"sdxl {name}.safetensors", [(image, 1.0)]
    ways = "mixed requantize like"
    llama, fp8 = FIXTURES / "llama" / "base", FIXTURES / "llama" / "fp8"
    bases = {"fp8": (fp8, llama, FIXTURES / "llama" / "adapter", ways)}
    vectors = json.loads((FIXTURES / "coded" / "index.json").read_text())["vectors"]
    bases |= {name: (*write_coded(folder, name, vectors[name]), each) for name, each in CODED.items()}
    for name, (coded, original, adapter, each) in bases.items():
        for way in each.split():
            options: dict[str, Any] = {"quantized": way, "allow": ["lossy"]}
            options = {"like": coded, "undo": False} if way == "like" else options
            merges[f"{name} {way}"] = original if way == "like" else coded, [(adapter, 1.0)], options
    (folder / "merges.json").write_text(json.dumps(merges, default=str))
    return merges


def digest_merges(folder: str, workers: int | None = None) -> dict[str, str]:
    """Merge everything in a fixture; return the digests as TABLE has them. (Its source is run in other processes.)"""
    import hashlib
    import json
    import tempfile
    from pathlib import Path

    import loratool

    found = {}
    for name, (base, adapters, *options) in json.loads((Path(folder) / "merges.json").read_text()).items():
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / ("out" if Path(base).is_dir() else "out.safetensors")
            chosen = options[0] if options else {}
            loratool.merge(base, [tuple(adapter) for adapter in adapters], out, workers=workers, **chosen)
            digests = [hashlib.sha256(), hashlib.sha256()]
            for file in sorted(Path(place).rglob("*")):
                if file.suffix in (".safetensors", ".undo"):
                    digests[file.suffix == ".undo"].update(file.read_bytes())
            found[name] = " ".join(digest.hexdigest()[:16] for digest in digests)
    return found


def digest_elsewhere(
    folder: Path, variables: Mapping[str, str], before: str = "", workers: int | None = None, python: str | Path = ""
) -> dict[str, str]:
    """Return `digest_merges` of a new process, which has these variables and runs `before` first."""
    source = f"from __future__ import annotations\n{before}\n{inspect.getsource(digest_merges)}"
    call = f"import json\nprint(json.dumps(digest_merges({str(folder)!r}, {workers})))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python or sys.executable, "-c", f"{source}\n{call}"],
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def differing(found: Mapping[str, str]) -> dict[str, str]:
    """Return the merges that are not as TABLE has them, each with which of its two files."""
    kinds = ("weights", "undo")
    differ = {
        name: [kind for kind, a, b in zip(kinds, found[name].split(), pinned.split(), strict=True) if a != b]
        for name, pinned in TABLE.items()
    }
    return {name: " and ".join(files) for name, files in differ.items() if files}


FLUSH = "import torch; torch.set_flush_denormal(True)"
DOUBLE = "import torch; torch.set_default_dtype(torch.float64)"
OTHER_ZLIB = """
import sys, types, zlib
stub = types.ModuleType("zlib")
stub.__dict__.update(zlib.__dict__)
stub.compress = lambda data, /, level=0, wbits=15: zlib.compress(data, 0)
stub.compressobj = lambda *arguments, **options: zlib.compressobj(0)
sys.modules["zlib"] = stub
"""
NEW_GENERATION = "import sys, zlib_ng.zlib_ng; sys.modules['zlib'] = zlib_ng.zlib_ng"

# name -> (environment variables, what runs first, workers)
TOGETHER: dict[str, tuple[dict[str, str], str, int]] = {
    "without vectors, subnormals flushed, another zlib": (
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
        f"{FLUSH}\n{OTHER_ZLIB}",
        1,
    ),
    "AVX2, float64 by default, short products": (
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2"},
        f"{DOUBLE}; torch.set_float32_matmul_precision('medium')",
        2,
    ),
}
ALONE: dict[str, tuple[dict[str, str], str, int]] = {
    "one thread": ({"OMP_NUM_THREADS": "1"}, "", 1),
    "two threads": ({"OMP_NUM_THREADS": "2"}, "", 2),
    "two workers of one thread": ({"OMP_NUM_THREADS": "1"}, "", 2),
    **{f"torch for {isa}": ({"ATEN_CPU_CAPABILITY": isa}, "", 2) for isa in ("default", "avx2", "avx512")},
    "MKL the same on every CPU": ({"MKL_CBWR": "COMPATIBLE"}, "", 2),
    "MKL for SSE4.2": ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, "", 2),
    "oneDNN without AVX": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, "", 2),
    "subnormals flushed": ({}, FLUSH, 2),
    "float64 by default": ({}, DOUBLE, 2),
    "medium products": ({}, "import torch; torch.set_float32_matmul_precision('medium')", 2),
    "high products": ({}, "import torch; torch.set_float32_matmul_precision('high')", 2),
    "another zlib": ({}, OTHER_ZLIB, 2),
}


KINDS = ("lora", "dora", "dora and lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everywhere")
    write_fixture(folder)
    return folder


@pytest.mark.parametrize("native", ["0", pytest.param("1", marks=needs_passes)])
def test_merges_have_the_bytes_of_the_table(folder: Path, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled passes and with them."""
    monkeypatch.setenv("LORATOOL_NATIVE", native)
    found = digest_merges(str(folder))
    assert found.keys() == TABLE.keys() and differing(found) == {}


@needs_passes
@pytest.mark.parametrize("native", ["0", "1"])
def test_what_one_way_merges_the_other_way_restores(
    folder: Path, tmp_path: Path, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the compiled passes and without them."""
    import loratool

    merges = json.loads((folder / "merges.json").read_text())
    for name in (f"{kind} {dtype}" for kind in KINDS for dtype in ("bf16", "fp16", "fp32")):
        base, adapters = merges[name]
        requests = [tuple(adapter) for adapter in adapters]
        out, back = tmp_path / f"{name}.safetensors", tmp_path / f"{name} back.safetensors"
        monkeypatch.setenv("LORATOOL_NATIVE", native)
        loratool.merge(base, requests, out)
        monkeypatch.setenv("LORATOOL_NATIVE", str(1 - int(native)))
        loratool.unmerge(out, requests, back)
        assert back.read_bytes() == Path(base).read_bytes()


@pytest.mark.parametrize("name", few(TOGETHER, next(iter(TOGETHER))))
def test_the_same_where_much_differs(folder: Path, name: str) -> None:
    assert differing(digest_elsewhere(folder, *TOGETHER[name])) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_the_same_where_one_thing_differs(folder: Path, name: str) -> None:
    assert differing(digest_elsewhere(folder, *ALONE[name])) == {}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("zlib_ng") is None, reason="zlib-ng is not installed")
def test_the_same_with_zlib_ng(folder: Path) -> None:
    """Distributions put it in zlib's place; it compresses to other bytes at most levels."""
    assert differing(digest_elsewhere(folder, {}, NEW_GENERATION)) == {}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_order_of_ranks_does_not_show(folder: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    """Only the adapter's own hash in the header and in the undo file is another."""
    import loratool

    base, ((adapter, _),) = json.loads((folder / "merges.json").read_text())[f"{kind} {dtype}"]
    order = torch.from_numpy(np.array([3, 1, 5, 0, 2, 4]))
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    for name, x in tensors.items():
        if name.endswith((".lora_A.weight", "_embedding_A")):
            tensors[name] = x[order].contiguous()
        elif name.endswith((".lora_B.weight", "_embedding_B")):
            tensors[name] = x[:, order].contiguous()
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_bytes((Path(adapter) / "adapter_config.json").read_bytes())
    data = []
    for path, name in ((adapter, "a"), (tmp_path / "adapter", "b")):
        loratool.merge(base, path, tmp_path / f"{name}.safetensors")
        found = (tmp_path / f"{name}.safetensors").read_bytes()
        data.append(found[8 + int.from_bytes(found[:8], "little") :])
    assert data[0] == data[1]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_same_everywhere.py --write")
    with tempfile.TemporaryDirectory() as place:
        write_fixture(Path(place))
        rows = [f'    "{name}": "{digests}",' for name, digests in digest_merges(place).items()]
    print("TABLE = {", *rows, "}", sep="\n")
