"""Hold what `convert --for transformers` writes against both that read it: PEFT's `PeftModel` and `load_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pair
from servers import convert

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft", minversion="0.19")
transformers = pytest.importorskip("transformers", minversion="5.0")

# name -> (table of tiny's and type, options of PEFT's)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("causal:llama", {}),
    "rslora": ("causal:llama", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "ranks and scales": ("causal:llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}}),
    "dora": ("causal:llama", {"use_dora": True}),
    "saved head": ("causal:llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding and head": ("causal:llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "stacks": ("causal:mixtral", {}),
    "a wrapper": ("image:llava", {}),
    "a tower": ("image:llava", {"target_modules": r".*vision_tower.*\.q_proj"}),
}


@pytest.mark.parametrize("reader", ["peft", "load_adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_answer_as_the_merge(tmp_path: Path, kind: str, reader: str) -> None:
    family, options = KINDS[kind]
    merged = pair(tmp_path, *family.split(":"), **options)
    out = convert(tmp_path, "transformers")
    base = type(merged).from_pretrained(tmp_path / "base", dtype=torch.float32)
    if reader == "peft":
        found = peft.PeftModel.from_pretrained(base, out).merge_and_unload()
    else:
        base.load_adapter(str(out))
        found = base
    inputs: dict[str, Any] = {"input_ids": torch.arange(5, 15)[None]}
    if kind == "a tower":
        size = merged.config.vision_config.image_size
        image = torch.full((1, 4), merged.config.image_token_id)
        inputs = {"input_ids": torch.cat([image, inputs["input_ids"]], 1), "pixel_values": torch.ones(1, 3, size, size)}
    with torch.no_grad():
        answers = [model.float().eval()(**inputs).logits for model in (found, merged)]
        assert torch.allclose(*answers, rtol=1e-4, atol=1e-4 * float(answers[1].abs().max()))
        unadapted = type(merged).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()(**inputs).logits
        assert not torch.allclose(unadapted, answers[1], rtol=1e-4, atol=1e-4 * float(answers[1].abs().max()))
