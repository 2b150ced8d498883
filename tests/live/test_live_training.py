"""Merge for generation and unmerge for training, as trainers do; and hold the drift of peft's own way beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, slow
from lib.models.peft_models import TOKENS, agree, answer, llama, peft, transformers, wrap
from torch import Tensor

import loratool

pytestmark = [pytest.mark.filterwarnings("ignore")]

MODULES = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8}


def base_of(model: Any) -> dict[str, Tensor]:
    """The weights of a PeftModel without the adapter's."""
    return {n: x.detach().clone() for n, x in model.state_dict().items() if "lora_" not in n}


def plain(name: str) -> str:
    """The name of a weight in the base's files."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> int:
    """How many weights differ, in any bit."""
    width = {n: x.element_size() for n, x in wanted.items()}
    return sum(
        int((bits(found[n]) != bits(x)).reshape(-1, width[n]).any(1).sum()) for n, x in wanted.items() if x.numel()
    )


class Engine:
    """A server of another model object, which is given weights by name: vLLM's `load_weights`, verl's rollouts."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, x in weights:
            self.weights[name] = x.clone()
            loaded.add(name)
        return loaded


def test_a_trainer_merges_to_generate_and_unmerges_to_train(tmp_path: Path) -> None:
    """TRL's and verl's loop: rollouts by the merged weights, here or in an engine, and a step of the adapter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(llama().bfloat16(), peft.LoraConfig(task_type="CAUSAL_LM", **MODULES))
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.05)
    before, engine, rollouts = base_of(model), Engine(), []
    for _ in range(4):
        # a rollout: the adapter's file is the one of the step before, which is written over
        model.save_pretrained(tmp_path / "adapter")
        with model.disable_adapter(), loratool.live.merged(model, tmp_path / "adapter") as live:
            rollouts.append(model.generate(input_ids=TOKENS[:, :4], max_new_tokens=4, do_sample=False))
            inner = model.get_base_model().state_dict()
            engine.load_weights((n.replace(".base_layer", ""), x) for n, x in inner.items() if "lora_" not in n)
            assert live.report.changed is not None
        assert differing(base_of(model), before) == 0
        # a step, on the base and the adapter apart
        loss = model(input_ids=rollouts[-1], labels=rollouts[-1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert differing(base_of(model), before) == 0
    assert not all(torch.equal(rollouts[0], each) for each in rollouts[1:])  # it learned
    # what the engine has of the last step is the merge of files
    clean = llama().bfloat16()
    clean.load_state_dict({plain(name): x for name, x in before.items()})
    clean.save_pretrained(tmp_path / "base")
    merged = dict(loratool.iter_merged(tmp_path / "base", tmp_path / "adapter"))
    assert merged.keys() == engine.weights.keys() and differing(engine.weights, merged) == 0


def test_the_merged_module_answers_as_peft(tmp_path: Path) -> None:
    model = wrap(llama(), **MODULES)
    wanted = answer(model)
    model.save_pretrained(tmp_path / "adapter")
    with model.disable_adapter(), loratool.live.merged(model, tmp_path / "adapter"):
        assert agree(answer(model), wanted)
    assert agree(answer(model), wanted)


def trained(model: Any, cycles: int, moving: bool) -> Iterator[int]:
    """Move an adapter between cycles, as training does."""
    g = torch.Generator().manual_seed(3)
    for cycle in range(cycles):
        for name, x in model.named_parameters() if moving else ():
            if "lora_" in name:
                x.data.add_(torch.randn(x.shape, generator=g).to(x.dtype) * 0.02)
        yield cycle


@pytest.mark.parametrize(
    ("dtype", "cycles", "moving"),
    [
        (torch.bfloat16, 20, True),
        (torch.bfloat16, 3, False),
        *(slow(dtype, 1000, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *(slow(dtype, 1000, False) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    ],
)
def test_peft_drifts_and_this_does_not(dtype: torch.dtype, cycles: int, moving: bool, tmp_path: Path) -> None:
    """trl#6688: merge_adapter and unmerge_adapter on one model, live.merge and unmerge on its twin."""
    torch.manual_seed(0)
    start = llama().to(dtype).state_dict()
    twins = []
    for _ in range(2):
        model = transformers.LlamaForCausalLM(llama().config).to(dtype)
        model.load_state_dict(start)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **MODULES))
        g = torch.Generator().manual_seed(1)
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.data.copy_(torch.randn(x.shape, generator=g) * 0.1)
        twins.append(model)
    theirs, ours = twins
    before = base_of(ours)
    for _ in trained(theirs, cycles, moving):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    for _ in trained(ours, cycles, moving):
        ours.save_pretrained(tmp_path / "adapter")
        loratool.live.merge(ours, tmp_path / "adapter").unmerge()
    assert differing(base_of(ours), before) == 0
    assert differing(base_of(theirs), before) > 0
