"""Name what a merge leaves behind: MTP layers, and copies of a changed embedding or head in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.models.mtp_models import DEEPSEEK, MODELS, D

import loratool

HEAD, COPY = "lm_head", "model.layers.2.shared_head.head.weight"
LAYERS = "the MTP layers are unchanged"
COPIES = "copies of changed tensors are unchanged"


def notes(folder: Path, family: str, shapes: dict[str, tuple[int, int]], **options: Any) -> tuple[str, ...]:
    """Return the warnings of a merge of LoRA on these modules."""
    base = write_model(folder / "base", *MODELS[family])
    adapter = write_peft(folder / "adapter", {module: factors(*shape, 2) for module, shape in shapes.items()})
    return loratool.merge(base, adapter, folder / "merged", **options).warnings


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dry_run", [False, True])
def test_mtp_layers_stay_as_they_were(family: str, dry_run: bool, tmp_path: Path) -> None:
    found = notes(tmp_path, family, {"model.layers.0.self_attn.q_proj": (D, D)}, dry_run=dry_run)
    (note,) = [each for each in found if LAYERS in each]
    assert COPIES not in note and ("mtp." if family == "qwen3_next" else "model.layers.2.") in note


def test_a_copy_of_the_head(tmp_path: Path) -> None:
    found = notes(tmp_path, "deepseek_v3", {HEAD: (20, D)})
    assert [note for note in found if note.endswith(f"{COPIES}: {COPY}")]
    before, after = load_model(tmp_path / "base"), load_model(tmp_path / "merged")
    assert torch.equal(before[COPY], before["lm_head.weight"]) and torch.equal(after[COPY], before[COPY])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    loratool.unmerge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert all(torch.equal(load_model(tmp_path / "back")[name], W) for name, W in before.items())


@pytest.mark.parametrize("row", [0, 10, 19])
def test_what_differs_is_no_copy(row: int, tmp_path: Path) -> None:
    tensors = {name: W.clone() for name, W in MODELS["deepseek_v3"][0].items()}
    tensors[COPY][row, 3] += 1
    base = write_model(tmp_path / "base", tensors, DEEPSEEK)
    adapter = write_peft(tmp_path / "adapter", {HEAD: factors(20, D, 2)})
    found = loratool.merge(base, adapter, tmp_path / "merged").warnings
    assert any(LAYERS in note for note in found) and not any(COPIES in note for note in found)


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.layers.2.eh_proj": (D, 2 * D)},
        {"model.layers.2.eh_proj": (D, 2 * D), "model.layers.0.self_attn.q_proj": (D, D)},
    ],
    ids=["MTP alone", "both"],
)
def test_an_adapter_of_the_mtp_layer_brings_no_note(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    assert not notes(tmp_path, "deepseek_v3", shapes)


def test_a_tied_embedding_is_found_beside_its_copy(tmp_path: Path) -> None:
    """A head that changes alone is untied from the model's embedding, which is not the MTP layer's."""
    tensors = {name: W for name, W in MODELS["glm4_moe"][0].items() if name != "lm_head.weight"}
    settings = {**MODELS["glm4_moe"][1], "tie_word_embeddings": True}
    base = write_model(tmp_path / "base", tensors, settings)
    adapter = write_peft(tmp_path / "adapter", {HEAD: factors(20, D, 2)})
    report = loratool.merge(base, adapter, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    A, B = (x.double() for x in factors(20, D, 2))
    change = merged["lm_head.weight"].double() - tensors["model.embed_tokens.weight"].double()
    assert torch.allclose(change, B @ A, atol=1e-5)  # write_peft's alpha is its rank
    assert torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(merged["model.layers.2.embed_tokens.weight"], weights(20, D, seed=3))
    assert any("untied" in note for note in report.warnings)
