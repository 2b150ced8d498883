"""Hold which adapters may be of one model: some that share no module; the others are refused without --allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, write_kohya, write_peft
from safetensors.torch import load_file, save_file

import loratool

Run = Callable[..., Any]

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def of(folder: Path, modules: dict[str, tuple[int, int]], base: str | None = None) -> Path:
    return write_peft(folder, {m: factors(*shape, 2) for m, shape in modules.items()}, base_model_name_or_path=base)


def modules_of(adapter: Path) -> set[str]:
    return set(load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        ({Q: (8, 8)}, {"transformer.h.0.attn.c_attn": (24, 8)}, "its layers are in transformer.h, not model.layers"),
        ({Q: (8, 8)}, {UP: (20, 6)}, "no width: 20x6 and 8x8"),
        ({"lm_head": (30, 8)}, {UP: (20, 6)}, "no width: 20x6 and 30x8"),
    ],
    ids=["layers", "width", "head"],
)
def test_of_two_models(
    one: dict[str, tuple[int, int]], two: dict[str, tuple[int, int]], says: str, tmp_path: Path, run: Run
) -> None:
    a, b = of(tmp_path / "a", one, "x/one"), of(tmp_path / "b", two, "x/two")
    call = ["combine", a, b, "-o", tmp_path / "out"]
    refused = run(*call)
    assert refused.exit_code == 4 and refused.stderr.startswith(f"error: {b}: has no module in common with {a}, ")
    assert says in refused.stderr and "add --allow unrelated" in refused.stderr and not (tmp_path / "out").exists()
    assert run(*call, "--allow", "unrelated").exit_code == 0
    assert modules_of(tmp_path / "out") == modules_of(a) | modules_of(b)
    told = run("diff", a, b)
    assert told.exit_code == 3 and says in told.stderr and "nothing can be compared" in told.stderr
    with pytest.raises(loratool.UsageError, match="allow: 'all' is none of unrelated"):
        loratool.combine([a, b], tmp_path / "out", allow=["all"])


@pytest.mark.parametrize(
    "two",
    [{UP: (20, 8)}, {"model.layers.7.self_attn.q_proj": (8, 8)}, {"lm_head": (30, 8)}, {Q: (8, 8), "x": (3, 3)}],
    ids=["another kind", "another layer", "the head", "one in common"],
)
def test_of_one_model(two: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    pair = [of(tmp_path / "a", {Q: (8, 8)}, "x/one"), of(tmp_path / "b", two, "x/two")]
    loratool.combine(pair, tmp_path / "out")
    assert modules_of(tmp_path / "out") == modules_of(pair[0]) | modules_of(pair[1])
    assert not loratool.diff(*pair).same


def test_who_names_one_base_is_believed(tmp_path: Path) -> None:
    pair = [of(tmp_path / m, {f"{m}.0.q": (size, size)}, "x/one") for m, size in (("vision", 8), ("text", 6))]
    loratool.combine(pair, tmp_path / "out")
    assert loratool.diff(*pair).cosine == 0  # type: ignore[union-attr]


def test_one_between_two_relates_them(tmp_path: Path, run: Run) -> None:
    a, b = of(tmp_path / "a", {"vision.0.q": (8, 8)}), of(tmp_path / "b", {"text.0.q": (6, 6)})
    both = of(tmp_path / "both", {"vision.0.q": (8, 8), "text.0.q": (6, 6)})
    other = of(tmp_path / "other", {"h.0.q": (5, 5)})
    for order in ((a, b, both), (both, a, b), (a, both, b)):
        assert run("combine", *order, "-o", tmp_path / "out", "--force").exit_code == 0
    refused = run("combine", a, other, both, other, "-o", tmp_path / "no")
    assert refused.exit_code == 4 and f"{other}: has no module in common with {a}" in refused.stderr


def test_image_models_of_two_families(tmp_path: Path, run: Run) -> None:
    names = (
        "double_blocks_0_img_attn_proj",
        "input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "output_blocks_0_1_transformer_blocks_0_attn1_to_k",
    )
    flux, sdxl, other = (
        write_kohya(tmp_path / f"{i}.safetensors", {name: factors(6 + i, 6 + i, 2)}, torch.tensor(2.0))
        for i, name in enumerate(names)
    )
    layer = {"text_model_encoder_layers_0_mlp_fc1": factors(32, 9, 2)}
    te = write_kohya(tmp_path / "te.safetensors", layer, torch.tensor(2.0), prefix="lora_te1")
    call = ["combine", flux, sdxl, "-o", tmp_path / "out.safetensors"]
    refused = run(*call)
    assert refused.exit_code == 4 and f"{sdxl}: is of SDXL, {flux} of Flux" in refused.stderr
    assert run(*call, "--allow", "unrelated").exit_code == 0
    assert run("diff", flux, sdxl).exit_code == 3
    for pair in ((sdxl, other), (sdxl, te), (flux, te)):
        assert run("combine", *pair, "-o", tmp_path / "out.safetensors", "--force").exit_code == 0


def test_one_model_by_the_names_of_two_versions_of_transformers(tmp_path: Path, run: Run) -> None:
    a = of(tmp_path / "a", {"model.language_model.layers.0.q": (8, 8)}, "x/one")
    b = of(tmp_path / "b", {"language_model.model.layers.0.q": (8, 8)}, "x/one")
    refused = run("combine", a, b, "-o", tmp_path / "out")
    assert refused.exit_code == 3 and "they come from two model classes" in refused.stderr


def test_an_empty_adapter_is_of_any_model(tmp_path: Path) -> None:
    one, none = of(tmp_path / "one", {Q: (8, 8)}), of(tmp_path / "none", {Q: (8, 8)})
    save_file({}, none / "adapter_model.safetensors")
    loratool.combine([none, one], tmp_path / "out")
    assert modules_of(tmp_path / "out") == modules_of(one)
