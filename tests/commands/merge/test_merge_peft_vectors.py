"""Hold kinds of PEFT whose modules take their numbers from shared or added vectors against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from conftest import few, slow
from lib.models.peft_tables import Net, peft, write
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.adapters.updates.softmax import softmax
from loratool.adapters.updates.tinylora import COMPARED, DRAWN, _start
from loratool.errors import InputError

pytestmark = [pytest.mark.filterwarnings("ignore")]


def edited(folder: Path, **changes: Any) -> None:
    """Replace tensors by the ends of their names; None removes one."""
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for end, value in changes.items():
        (name,) = (name for name in tensors if name.endswith(f"wide.{end}") or name.endswith(f"model.{end}"))
        del tensors[name]
        if value is not None:
            tensors[name] = value
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("variant", "changes", "match"),
    [
        ("unilora", {"unilora_indices_A": torch.full((4, 32), 64)}, "index 64, where the indices are 0 to 63"),
        ("unilora", {"unilora_indices_B": torch.full((48, 4), -1)}, "negative numbers"),
        ("unilora", {"unilora_indices_A": torch.full((4, 32), 0.5)}, "fractions"),
        ("unilora", {"unilora_indices_A": torch.zeros(4, 32).half()}, "not one of whole numbers"),
        ("unilora", {"unilora_indices_A": torch.zeros(3, 32, dtype=torch.int64)}, "cannot be multiplied"),
        ("unilora", {"unilora_scales_B": torch.zeros(48, 3)}, "cannot be multiplied"),
        ("unilora", {"unilora_scales_B": None}, "unilora_scales_B"),
        ("unilora", {"unilora_theta_d": None}, "unilora_theta_d"),
        ("tinylora", {"tinylora_P": torch.zeros(7, 2, 2)}, "cannot be multiplied"),
        ("tinylora", {"tinylora_A": torch.zeros(3, 32)}, "cannot be multiplied"),
        ("tinylora", {"tinylora_P": None}, "save_projection=True"),
        ("vblora", {"vblora_logits_A_topk_indices": torch.full((4, 2, 3), 24, dtype=torch.uint8)}, "index 24"),
        ("vblora", {"vblora_logits_A_topk_weights": torch.zeros(4, 2, 3)}, "not of one rank"),
        ("vblora", {"vblora_logits_B_topk_weights": None}, "topk_weights"),
        ("vblora with logits", {"vblora_logits_A": torch.zeros(4, 2, 24)}, "equal logits"),
        ("vblora with logits", {"vblora_logits_A": torch.zeros(4, 2, 23)}, "not of one rank"),
        ("vblora with logits", {"vblora_logits_B": None}, "vblora_logits_B"),
        ("delora", {"delora_A": torch.zeros(3, 32)}, "cannot be multiplied"),
        ("delora", {"delora_lambda": torch.zeros(2)}, "cannot be multiplied"),
        ("delora", {"delora_lambda": torch.full((1,), torch.inf)}, "nan or inf"),
        ("delora", {"delora_w_norm": None}, "delora_w_norm"),
        ("beft", {"beft_bias": torch.zeros(2, 24)}, "not one row"),
        ("beft", {"beft_bias": torch.zeros(1, 47)}, "adds"),
    ],
)  # fmt: skip
def test_what_fits_no_definition_is_refused(tmp_path: Path, variant: str, changes: Any, match: str) -> None:
    write(tmp_path, variant)
    edited(tmp_path, **changes)
    with pytest.raises(InputError, match=match):
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")


@pytest.mark.parametrize("variant", ["unilora", "tinylora", "vblora", "delora"])
def test_a_rank_that_the_config_does_not_say_is_refused(tmp_path: Path, variant: str) -> None:
    write(tmp_path, variant)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 9}))
    with pytest.raises(InputError, match="rank 9"):
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")


class Stack(nn.Module):
    """More layers than ten, whose numbers are not in the order of letters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"v": nn.Linear(6, 5), "k": nn.Linear(6, 4)}) for _ in range(11))


def write_groups(folder: Path, targets: list[str], tying: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Write a base in float64 and an adapter of TinyLoRA; return what peft merges in float64."""
    torch.manual_seed(1)
    model = Stack().double()
    save_file(model.state_dict(), folder / "base.safetensors")
    config = peft.TinyLoraConfig(target_modules=targets, u=3, weight_tying=tying, init_weights="uniform")
    live = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, x in [*live.named_parameters(), *live.named_buffers()]:
        if "tinylora_" in name:
            x.data = x.data.to(dtype)
    live.save_pretrained(folder / "a")
    merged: dict[str, torch.Tensor] = live.double().merge_and_unload().state_dict()
    return merged


# tying, targets: "v" is before "k" in the class, unlike in the order of letters
GROUPS = [(tying, targets) for tying in (0.0, 0.6, 0.5, 0.9) for targets in (["v"], ["v", "k"])]


@pytest.mark.parametrize("dtype", few((torch.float64, torch.float32, torch.bfloat16, torch.float16), torch.float32))
@pytest.mark.parametrize(("tying", "targets"), GROUPS[:4] + [slow(*each) for each in GROUPS[4:]])
def test_random_matrices_of_tinylora_tell_the_groups(
    tmp_path: Path, tying: float, targets: list[str], dtype: torch.dtype
) -> None:
    wanted = write_groups(tmp_path, targets, tying, dtype)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    loratool.merge(base, tmp_path / "a", out)
    found = load_file(out)
    change = max((wanted[name] - before).abs().max() for name, before in load_file(base).items())
    assert all((found[name] - wanted[name]).abs().max() <= 1e-12 * change for name in wanted)
    assert loratool.verify(base, tmp_path / "a", out).status == "proven"
    loratool.unmerge(out, tmp_path / "a", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("targets", [["v"], ["v", "k"]])
@pytest.mark.parametrize("damage", ["seed", "no seed", "module", "one matrix", "two alike"])
def test_groups_of_tinylora_that_nothing_tells_are_refused(tmp_path: Path, targets: list[str], damage: str) -> None:
    """Numbers in paths tell the order where no random matrix does, and never against one."""
    wanted = write_groups(tmp_path, targets, 0.5, torch.float32)
    path, file = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    tensors, name = load_file(file), "base_model.model.layers.{}.v.tinylora_P"
    if damage == "seed":
        path.write_text(json.dumps({**json.loads(path.read_text()), "projection_seed": 7}))
    elif damage == "no seed":
        path.write_text(json.dumps({**json.loads(path.read_text()), "projection_seed": "7"}))
    elif damage == "module":
        tensors = {key: x for key, x in tensors.items() if ".layers.3." not in key}
    elif damage == "one matrix":
        tensors[name.format(4)] += 1
    else:
        tensors[name.format(4)] = tensors[name.format(5)].clone()
    save_file(tensors, file)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    if targets == ["v"] and "seed" in damage:
        loratool.merge(base, tmp_path / "a", out)
        assert all((load_file(out)[name] - x).abs().max() <= 1e-12 for name, x in wanted.items())
        return
    with pytest.raises(InputError, match=r"vectors of groups(.|\n)*merge it with peft"):
        loratool.merge(base, tmp_path / "a", out)
    report: Any = loratool.inspect(tmp_path / "a")
    assert any("vectors of groups" in problem for problem in report.problems)


@pytest.mark.parametrize("size", [80, 81, 96, 257, 4096])
def test_a_draw_starts_as_a_longer_one(size: int) -> None:
    long = torch.normal(0.0, 0.5, (size,), generator=torch.Generator().manual_seed(11)).double().numpy()
    assert (_start(11, 4, DRAWN)[:COMPARED] == long[:COMPARED]).all()


def test_mica_is_plain_lora(tmp_path: Path) -> None:
    """Started in float32, the only type in which peft can."""
    torch.manual_seed(2)
    model, base, out = Net(), tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({name: x.double() for name, x in model.state_dict().items()}, base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["wide", "square"], init_lora_weights="mica")
    live = peft.get_peft_model(model, config).double()
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    live.save_pretrained(tmp_path / "adapter")
    wanted, before = live.merge_and_unload().state_dict(), load_file(base)
    loratool.merge(base, tmp_path / "adapter", out)
    found = load_file(out)
    assert all((found[n] - x).abs().max() <= 1e-12 * (x - before[n]).abs().max() for n, x in wanted.items())
    assert not torch.equal(found["wide.weight"], before["wide.weight"])
    assert loratool.verify(base, tmp_path / "adapter", out).status == "proven"
    loratool.unmerge(out, tmp_path / "adapter", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("topk", [None, 0, 25, True, 2.0])
def test_a_number_of_vectors_that_the_bank_lacks_is_refused(tmp_path: Path, topk: Any) -> None:
    write(tmp_path, "vblora with logits")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "topk": topk}))
    with pytest.raises(InputError, match="topk"):
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "logits",
    [[0.0, 0.0, 0.0], [1.0, -1e300, 0.5], [3e38, 1.0], [5e-324, 0.0], [1e-30, -1e-30, 7.0], [709.0, 0.0, -40.0]],
)
def test_weights_are_the_nearest_numbers(logits: list[float]) -> None:
    """By mpmath's powers of 4000 bits."""
    with mpmath.workprec(4000):
        powers = [mpmath.exp(mpmath.mpf(x) - max(logits)) for x in logits]
        assert softmax(logits) == [float(power / mpmath.fsum(powers)) for power in powers]


def test_factors_of_zero_are_no_change(tmp_path: Path) -> None:
    """DeLoRA's norms have a least value, so that a factor of zeros has a scale."""
    write(tmp_path, "delora")
    edited(tmp_path, delora_A=torch.zeros(4, 32))
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    loratool.merge(base, tmp_path / "adapter", out)
    assert torch.equal(load_file(out)["wide.weight"], load_file(base)["wide.weight"])
