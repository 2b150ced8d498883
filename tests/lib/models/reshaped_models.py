"""Merge PEFT's adapters of every linear layer and stack of experts, and hold the result against peft's own merge.

The models are tiny, of transformers' classes; the base is what `save_pretrained` writes, with its historical names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")


def wrapped(model: Any, leave: str = "$^", with_head: bool = False, **options: Any) -> Any:
    """Return a PeftModel with random factors for every linear layer and stack of experts.

    Args:
        leave: an expression for the modules that get none.
        with_head: the output embedding gets some too.
        options: of LoraConfig.
    """
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and (with_head or module is not head)
        and not re.search(leave, name)
    ]
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n and not re.search(leave, n)]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=linear, target_parameters=stacks or None, **options)
    found = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return found


def hold(
    kind: Any,
    model: Any,
    folder: Path,
    leave: str = "$^",
    edit: Callable[[Path], None] = lambda folder: None,
    **options: Any,
) -> None:
    """Hold `merge` of an adapter of the model against peft, and `unmerge` and `verify` against the base's bytes.

    Args:
        edit: rewrites the saved base, into what a release has.
        options: of LoraConfig.
    """
    base, merged = folder / "base", folder / "merged"
    model.save_pretrained(base)
    edit(base)
    before = {name: W.clone() for name, W in kind.from_pretrained(base).state_dict().items()}
    model = kind.from_pretrained(base).float()
    adapter = wrapped(model, leave, **options)
    adapter.save_pretrained(folder / "adapter")
    wanted = adapter.merge_and_unload().state_dict()
    loratool.merge(base, [folder / "adapter"], merged)
    found = kind.from_pretrained(merged).state_dict()
    assert found.keys() == wanted.keys()
    changed = 0
    for name, W in wanted.items():
        change = float((W - before[name]).norm()) if W.is_floating_point() else 0.0
        changed += change > 0
        if W.is_floating_point():
            assert float((found[name] - W).norm()) <= 1e-5 * max(change, 1e-3), name
        else:
            assert torch.equal(found[name], W), name
    assert changed
    assert loratool.verify(base, [folder / "adapter"], merged).status == "proven"
    loratool.unmerge(merged, [folder / "adapter"], folder / "back")
    for file in base.glob("*.safetensors"):
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes()
