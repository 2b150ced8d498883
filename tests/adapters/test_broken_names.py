"""Read names that converters broke: the prefix twice, or `_lora_down` for `.lora_down`; a right file is meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.architectures.prefixes import KOHYA_PREFIXES
from loratool.errors import InputError

MODULES = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
)

BROKEN: dict[str, Callable[[str], str]] = {
    "twice": lambda name: re.sub(r"^(lora_[a-z]+_)", r"\1\1", name),
    "undotted": lambda name: name.replace(".lora_", "_lora_"),
    # as a converter of PEFT's names writes alphas, which cuts the factor's name at its first dot
    "undotted alpha": lambda name: name.replace(".lora_", "_lora_").replace(".alpha", "_lora_down.alpha"),
}
BROKEN["both"] = lambda name: BROKEN["twice"](BROKEN["undotted"](name))


def right() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for seed, module in enumerate(MODULES):
        tensors |= {f"{module}.lora_down.weight": weights(2, 8, seed=seed), f"{module}.alpha": torch.tensor(1.0)}
        tensors[f"{module}.lora_up.weight"] = weights(8, 2, seed=9 + seed)
    return tensors


@pytest.mark.parametrize("case", BROKEN)
def test_broken_names_are_read_and_said(tmp_path: Path, case: str) -> None:
    broken, path = BROKEN[case], tmp_path / "a.safetensors"
    save_file({broken(name): each for name, each in right().items()}, path)
    adapter = open_adapter(path)
    adapter.file.close()
    assert set(adapter.updates) == set(MODULES)
    assert all((update.scale, update.rank) == (0.5, 2) for update in adapter.updates.values())
    count = sum(broken(name) != name for name in right())
    assert adapter.notes[0].startswith(f"{count} names of {path} are broken, like ")
    loratool.convert(path, tmp_path / "b.safetensors", to="kohya")
    made = load_file(tmp_path / "b.safetensors")
    assert made.keys() == right().keys() and all(torch.equal(made[name], each) for name, each in right().items())


@pytest.mark.parametrize("prefix", KOHYA_PREFIXES)
def test_every_prefix_can_be_there_twice(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{prefix * 3}x_to_q.lora_{side}.weight": weights(2, 2) for side in ("up", "down")}, path)
    assert set(open_adapter(path).updates) == {f"{prefix}x_to_q"}


def test_a_module_that_is_there_under_both_names_is_refused(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", right()
    save_file({**tensors, **{BROKEN["twice"](name): each.clone() for name, each in tensors.items()}}, path)
    with pytest.raises(InputError, match="is the same as"):
        open_adapter(path)


def test_a_prefix_in_another_s_place_is_said_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name.replace("lora_te_", "lora_unet_lora_te_"): each for name, each in right().items()}, path)
    (note,) = open_adapter(path).notes
    rename = re.search(r"--rename '(.*)'", note)
    assert rename and "the prefixes of two components" in note
    loratool.convert(path, tmp_path / "b.safetensors", to="kohya", rename=[rename[1]])
    made = load_file(tmp_path / "b.safetensors")
    assert made.keys() == right().keys() and all(torch.equal(made[name], each) for name, each in right().items())
