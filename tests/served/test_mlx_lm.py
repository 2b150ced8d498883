"""Hold what `convert --for mlx` writes against mlx-lm: it reads base, adapter and PEFT's merge, and fuses by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pairs import pair
from servers import convert

pytestmark = pytest.mark.slow
pytest.importorskip("mlx_lm", reason="needs mlx_lm, which is in the extra `oracles`")

FAMILIES = """causal:llama causal:phi3 causal:qwen3 causal:gemma3_text causal:gemma3 causal:qwen3_moe causal:mixtral
    causal:glm4 causal:cohere2""".split()

# name -> (table and type, options of PEFT's): what an adapter can have beside factors of one rank and one scale
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("causal:llama", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "ranks": ("causal:llama", {"rank_pattern": {"q_proj": 4, "down_proj": 8}}),
    "scales": ("causal:llama", {"alpha_pattern": {"q_proj": 8, "model.layers.1.mlp.down_proj": 1}}),
    "one layer": ("causal:llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding and head": ("causal:llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "rslora of experts": ("causal:qwen3_moe", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
}


def fused(base: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Return the weights of mlx-lm's model of a folder, with an adapter fused into them."""
    import numpy
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    if adapter:
        model = load_adapters(model, str(adapter))
        layers = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
        model.update_modules(tree_unflatten(layers))
    return {name: numpy.array(weight) for name, weight in tree_flatten(model.parameters())}


def wrong(folder: Path, out: Path) -> list[str]:
    """Return the weights that mlx-lm's fusing and PEFT's merging do not agree on, to the bit."""
    found, wanted, before = fused(folder / "base", out), fused(folder / "merged"), fused(folder / "base")
    assert any((wanted[name] != before[name]).any() for name in wanted)
    assert found.keys() == wanted.keys()
    return [name for name in wanted if (found[name] != wanted[name]).any()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_gets_its_change(tmp_path: Path, family: str) -> None:
    pair(tmp_path, *family.split(":"))
    assert not wrong(tmp_path, convert(tmp_path, "mlx"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_written_so_that_it_acts(tmp_path: Path, kind: str) -> None:
    family, options = KINDS[kind]
    pair(tmp_path, *family.split(":"), **options)
    assert not wrong(tmp_path, convert(tmp_path, "mlx"))
