"""Refuse a base that lacks most of an adapter as the wrong one, and offer --exclude only where few are absent."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, write_peft
from safetensors.torch import save_file

import loratool
from loratool import InputError, NeedsFlag

Run = Callable[..., Any]

KINDS = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip


def model(folder: Path, layers: int, kinds: Mapping[str, tuple[int, int]] = KINDS, extra: Any = None) -> Path:
    folder.mkdir()
    tensors = {f"model.layers.{i}.{k}.weight": torch.zeros(shape) for i in range(layers) for k, shape in kinds.items()}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def adapter(folder: Path, layers: int, *more: str, named: str | None = "org/base", **kinds: tuple[int, int]) -> Path:
    modules = {f"model.layers.{i}.{k}": s for i in range(layers) for k, s in {**KINDS, **kinds}.items()}
    modules |= dict.fromkeys(more, (8, 16))
    return write_peft(folder, {m: factors(*s, 2) for m, s in modules.items()}, base_model_name_or_path=named)


def refusal(tmp_path: Path, kind: type[loratool.LoratoolError] = InputError) -> loratool.LoratoolError:
    with pytest.raises(kind) as caught:
        loratool.merge(tmp_path / "base", tmp_path / "style", tmp_path / "out")
    assert type(caught.value) is kind or kind is InputError
    return caught.value


@pytest.mark.parametrize("named", ["org/base", None])
def test_most_modules_absent_is_the_wrong_base(tmp_path: Path, named: str | None) -> None:
    model(tmp_path / "base", 5)
    adapter(tmp_path / "style", 32, named=named)
    error = refusal(tmp_path)
    head, *groups = error.message.splitlines()
    assert head == "189 of 224 modules are not in the base:" and error.culprit == str(tmp_path / "style")
    assert len(groups) == 1 and "in model.layers.{5..31}" in groups[0] and "and 3 more" in groups[0]
    for each in (tmp_path / "base", tmp_path / "style"):
        shutil.rmtree(each)
    model(tmp_path / "base", 2)
    adapter(tmp_path / "style", 3)
    assert "and 3 more in model.layers.2; nearest there" in refusal(tmp_path).message
    said = "its config names its base: org/base" if named else "is this the base that it was trained on?"
    assert error.remedy == said and "exclude" not in str(error)


def test_shapes_that_differ_in_most_are_the_wrong_base(tmp_path: Path) -> None:
    model(tmp_path / "base", 3, {**KINDS, **{k: (s[0], 32) for k, s in KINDS.items() if s[1] == 16}})
    adapter(tmp_path / "style", 3)
    error = refusal(tmp_path)
    start = "18 of 21 modules have other shapes in the base, like model.layers.0.mlp.gate_proj"
    assert error.message.startswith(start) and "(2, 16)" in error.message and "(24, 32)" in error.message
    assert error.remedy == "its config names its base: org/base"


def test_one_shape_that_differs_is_named_alone(tmp_path: Path) -> None:
    model(tmp_path / "base", 3, {**KINDS, "self_attn.o_proj": (32, 16)})
    adapter(tmp_path / "style", 3)
    assert refusal(tmp_path).culprit == "model.layers.0.self_attn.o_proj.weight"


def test_few_absent_modules_can_be_excluded(tmp_path: Path) -> None:
    model(tmp_path / "base", 3)
    adapter(tmp_path / "style", 3, "score", "model.layers.0.self_attn.g_proj", "model.layers.1.self_attn.g_proj")
    error = refusal(tmp_path, NeedsFlag)
    assert error.message.startswith("3 of 24 modules") and error.exit_code == 4
    words = shlex.split(str(error.remedy).partition(": ")[2])
    assert sorted(words[1].split(",")) == ["g_proj", "score"] and len(words) == 2
    report = loratool.merge(tmp_path / "base", tmp_path / "style", tmp_path / "out", exclude=words[1].split(","))
    assert len(report.tensors) == 21


@pytest.mark.parametrize(("count", "kind"), [(4, NeedsFlag), (5, InputError)])
def test_up_to_four_patterns_are_offered(tmp_path: Path, count: int, kind: type[loratool.LoratoolError]) -> None:
    model(tmp_path / "base", 3)
    adapter(tmp_path / "style", 3, *(f"extra_{i}" for i in range(count)))
    error = refusal(tmp_path, kind)
    assert error.exit_code == (4 if kind is NeedsFlag else 3) and f"{count} of {21 + count} modules" in error.message
    assert ("--exclude" in str(error.remedy)) is (kind is NeedsFlag)


def test_no_flag_is_offered_that_leads_to_the_next_error(tmp_path: Path) -> None:
    """Another shape is what stands in the way, whatever is excluded."""
    model(tmp_path / "base", 3, {**KINDS, "self_attn.o_proj": (32, 16)})
    adapter(tmp_path / "style", 3, "score")
    assert "o_proj" in str(refusal(tmp_path).culprit)


def test_each_of_several_adapters_is_looked_at(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 3)
    right, wrong = adapter(tmp_path / "right", 3), write_peft(tmp_path / "wrong", {"h.0.c_attn": factors(8, 8, 2)})
    with pytest.raises(InputError, match=f"{re.escape(str(wrong))}: 1 of 1 modules are not in the base") as caught:
        loratool.merge(base, [right, wrong], tmp_path / "out")
    assert caught.value.exit_code == 3


def test_a_component_that_the_base_does_not_have_makes_it_no_wrong_base(tmp_path: Path) -> None:
    """An adapter for a UNet and a text encoder, and one of them as the base."""
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    save_file({f"{clip}.weight": torch.zeros(8, 8)}, tmp_path / "base")
    unet = [f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q" for i in range(3)]
    A, B = factors(8, 8, 2)
    names = [*unet, f"lora_te_{clip.replace('.', '_')}"]
    save_file(
        {f"{n}.lora_{e}.weight": x.clone() for n in names for e, x in (("down", A), ("up", B))}, tmp_path / "style"
    )
    error = refusal(tmp_path, NeedsFlag)
    assert error.remedy == "to exclude them: --exclude 'lora_unet_*'"


@pytest.mark.parametrize("columns", [60, 80])
def test_it_is_six_lines_at_most(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    from lib.harness.terminal import open_terminal

    from loratool.cli.messages import print_error

    model(tmp_path / "base", 1)
    adapter(tmp_path / "style", 40, *(f"model.layers.{i}.extra.{i}" for i in range(1, 9)), "score\nhint: forged")
    monkeypatch.chdir(tmp_path)
    error = refusal(Path())
    assert not any(line.startswith("hint") for line in str(error).splitlines())
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = open_terminal(monkeypatch, columns)
    print_error(error)
    lines = terminal.look().splitlines()
    assert len(lines) <= 6 and max(map(len, lines)) <= columns and lines[-1].startswith("hint: its config names")


def test_an_image_adapters_metadata_names_its_base(tmp_path: Path) -> None:
    A, B = factors(8, 8, 2)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    save_file(tensors, tmp_path / "style", metadata={"ss_base_model_version": "flux1"})
    model(tmp_path / "base", 1)
    error = refusal(tmp_path)
    assert "is an image model's adapter" in error.message and error.remedy == "its metadata names its base: flux1"
