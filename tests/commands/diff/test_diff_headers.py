"""Hold diff --headers against the safetensors library's reader, and count what it asks a hub and a store for."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, run_command, write_kohya, write_model, write_peft
from files.hub.test_hub_download import hub
from files.hub.test_hub_headers import ranges
from lib.files.ggml_blocks import blocks_of
from lib.files.gguf_bytes import write
from lib.harness.hub_server import HubServer, files_in
from lib.harness.s3_server import serve_s3
from lib.harness.stores import s3_at
from lib.models.gguf_models import llama_fields, llama_tensors, llama_weights, write_llama
from safetensors import safe_open
from torch import Tensor

import loratool
from loratool import HeadersDiff, InputError
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES

__all__ = ["hub"]

LLAMA = FIXTURES / "llama"

TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool)


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Tensors of few names, shapes and types, so that two models share some of each."""
    choose = random.Random(seed)
    names = choose.sample([f"model.layers.{i}.{name}" for i in range(3) for name in "pqrs"], 8)
    shapes = {name: choose.choice([(2, 3), (3, 2), (6,), (), (0, 2)]) for name in names}
    return {name: torch.zeros(shape, dtype=choose.choice(TYPES)) for name, shape in shapes.items()}


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of each tensor, as the safetensors library reads them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                each = file.get_slice(name)
                found[name] = each.get_dtype(), tuple(each.get_shape())
    return found


def require_as_read(report: HeadersDiff, one: Path, two: Path) -> None:
    a, b = headers(one), headers(two)
    differing = {name: (a[name], b[name]) for name in a.keys() & b.keys() if a[name] != b[name]}
    rows = {row.name: ((row.dtype_a, row.shape_a), (row.dtype_b, row.shape_b)) for row in report.tensors}
    assert rows == differing and report.equal == len(a.keys() & b.keys()) - len(differing)
    assert {*report.only_a} == a.keys() - b.keys() and {*report.only_b} == b.keys() - a.keys()
    assert report.same == (a == b)


@pytest.mark.parametrize("seed", range(8))
def test_the_rows_are_what_the_library_reads(seed: int, tmp_path: Path) -> None:
    one = write_model(tmp_path / "a", random_tensors(seed), {}, shards=1 + seed % 3)
    two = write_model(tmp_path / "b", random_tensors(seed + 100), {})
    require_as_read(loratool.diff_headers(one, two), one, two)
    again = write_model(tmp_path / "c", random_tensors(seed), {}, shards=2)
    report = loratool.diff_headers(one, again)
    require_as_read(report, one, again)
    assert report.same


def test_adapters_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    one = write_peft(tmp_path / "a", {module: (torch.ones(2, 6), torch.ones(8, 2))})
    two = write_peft(tmp_path / "b", {module: (torch.ones(4, 6), torch.ones(8, 4).bfloat16())})
    report = loratool.diff_headers(one, two)
    require_as_read(report, one, two)
    assert "2 of another shape, 1 of another type; 0 of 2 tensors" in str(report)
    other = write_kohya(
        tmp_path / "k.safetensors", {module: (torch.ones(2, 6), torch.ones(8, 2))}, alpha=torch.tensor(2.0)
    )
    report = loratool.diff_headers(one, other)
    assert not report.tensors and len(report.only_a) == 2 and len(report.only_b) == 3
    assert "no name is in both" in str(report)


def test_a_torch_file_has_the_headers_of_the_same_model(tmp_path: Path) -> None:
    tensors = {name: x for name, x in random_tensors(3).items() if x.numel()}
    one = write_model(tmp_path / "a", tensors, {})
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert loratool.diff_headers(one, tmp_path / "pytorch_model.bin").same


def test_gguf_models_have_their_own_names_and_beside_others_theirs(tmp_path: Path) -> None:
    weights = llama_weights()
    number, size = GGML_TYPES["Q8_0"][0], BLOCK_TYPES["Q8_0"][0]
    tensors = {
        name: (number, shape, blocks_of("Q8_0", math.prod(shape) // size).tobytes()) if "attn_q" in name else each
        for name, each in llama_tensors(weights).items()
        for shape in [each[1]]
    }
    one, two = write_llama(tmp_path / "f32.gguf", weights), write(tmp_path / "q8.gguf", llama_fields(), tensors)
    report = loratool.diff_headers(one, two)
    quantized = [name for name, (kind, _, _) in tensors.items() if kind == number]
    assert [row.name for row in report.tensors] == sorted(quantized, key=[*tensors].index) and quantized
    assert {(row.dtype_a, row.dtype_b, row.codec_b) for row in report.tensors} == {("F32", "Q8_0", "Q8_0")}
    assert not report.only_a and not report.only_b
    model = write_model(tmp_path / "model", weights, {"model_type": "llama"})
    report = loratool.diff_headers(model, one)
    assert report.same and report.equal == len(weights)
    beside = {row.name: (row.dtype_b, row.shape_b) for row in loratool.diff_headers(model, two).tensors}
    assert beside == {name: ("Q8_0", tuple(x.shape)) for name, x in weights.items() if "q_proj" in name}


def test_a_quantized_weight_is_one_tensor_beside_another_format() -> None:
    report = loratool.diff_headers(LLAMA / "base", LLAMA / "fp8")
    assert report.only_a == report.only_b == () and len(report.tensors) == 21
    assert {(row.dtype_a, row.codec_a, row.codec_b) for row in report.tensors} == {("BF16", None, "fp8")}
    assert all(row.shape_a == row.shape_b for row in report.tensors)
    same = loratool.diff_headers(LLAMA / "fp8", LLAMA / "fp8")
    assert same.same and same.equal == len(headers(LLAMA / "fp8"))  # codes and scales


def test_scales_of_one_format_are_compared() -> None:
    one, two = (FIXTURES / "coded" / f"ct_pack4_{name}.safetensors" for name in ("group", "channel"))
    differing = {row.name.rpartition(".")[2] for row in loratool.diff_headers(one, two).tensors}
    assert differing == {"weight_scale"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("base tuned --fail-above 0", 0),
        ("base fp8", 0),
        ("base fp8 --fail-above 0", 1),
        ("base fp8 --fail-above 5", 1),
        ("base tuned --spectra", 2),
        ("base tuned --layers 0", 2),
        ("base tuned --digest", 2),
        ("base tuned fp8", 2),
        ("base adapter", 3),
        ("base nothing", 3),
    ],
)
def test_exit_codes(words: str, code: int) -> None:
    paths = [str(LLAMA / word) if (LLAMA / word).exists() else word for word in words.split()]
    assert run_command("diff", "--headers", *paths).exit_code == code


def test_a_tensor_of_one_side_is_above_a_limit(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    one = write_model(tmp_path / "a", tensors, {})
    two = write_model(tmp_path / "b", dict([*tensors.items()][1:]), {})
    codes = [run_command("diff", one, two, "--headers", "--fail-above", limit).exit_code for limit in ("0.9", "1")]
    assert codes == [1, 0]  # it counts as 1, as in a diff of numbers


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 12 MB in three shards, and two adapters of 2 MB."""
    folder, names = tmp_path_factory.mktemp("large"), [f"model.layers.{i}.mlp.up_proj" for i in range(6)]
    factors = {name: (torch.zeros(64, 1000), torch.zeros(1000, 64)) for name in names}
    for kind, dtype in (("one", torch.bfloat16), ("two", torch.float16)):
        tensors = {f"{name}.weight": torch.zeros(1000, 1000, dtype=dtype) for name in names}
        write_model(folder / kind, tensors, {"model_type": "llama"}, shards=3)
        write_peft(folder / f"{kind}-adapter", {name: factors[name] for name in names[kind == "two" :]})
    return folder


PAIRS = [pytest.param("one", "two", 3, id="models"), pytest.param("one-adapter", "two-adapter", 1, id="adapters")]


@pytest.mark.parametrize(("a", "b", "shards"), PAIRS)
def test_a_hub_is_asked_for_headers_alone(
    hub: HubServer, large: Path, a: str, b: str, shards: int, tmp_path: Path
) -> None:
    for name in (a, b):
        hub.add(f"org/{name}", files_in(large / name))
    near, far = loratool.diff_headers(large / a, large / b), loratool.diff_headers(f"org/{a}", f"org/{b}")
    assert without_paths(far) == without_paths(near)
    asked = [span for name, span in ranges(hub) if name.endswith(".safetensors")]
    taken = sum(int(last) - int(first) + 1 for span in asked for first, last in [span[6:].split("-")])
    assert len(asked) <= 2 * (shards + 1) and taken <= 2 * shards * 2**18 + 2  # to each repository one for a byte
    assert not [*tmp_path.glob("cache/**/*.safetensors")]


@pytest.mark.parametrize(("a", "b", "shards"), PAIRS)
def test_a_store_is_asked_for_headers_alone(large: Path, a: str, b: str, shards: int, tmp_path: Path) -> None:
    (tmp_path / "bucket").symlink_to(large, target_is_directory=True)
    with serve_s3(tmp_path) as server, s3_at(server.endpoint):
        far = loratool.diff_headers(f"s3://bucket/{a}", f"s3://bucket/{b}")
        configs = sum(len([*(large / name).glob("*.json")]) for name in (a, b))
        assert server.requests["GET"] <= 2 * shards + configs
    assert without_paths(far) == without_paths(loratool.diff_headers(large / a, large / b))


def without_paths(report: HeadersDiff) -> dict[str, Any]:
    return {key: value for key, value in vars(report).items() if key not in ("a", "b")}


def test_a_damaged_header(tmp_path: Path) -> None:
    write_model(tmp_path / "a", random_tensors(1), {})
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="model.safetensors"):
        loratool.diff_headers(tmp_path / "a", LLAMA / "base")
