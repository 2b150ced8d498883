"""Hold which inputs a module gets against adapters under GGUF's names, whose A has the same columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, write_kohya, write_peft
from lib.files.imatrix_files import write_gguf
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool import InputError
from loratool.binding.weights.input_moments import InputMoments
from loratool.files.imatrix_file import ImatrixFile

LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 2, "linear_value_head_dim": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
    "llama": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"model.layers.3.self_attn.q_proj": (16, 12), "model.layers.12.mlp.down_proj": (12, 20), "lm_head": (30, 12)},
    ),
    "gpt2": (
        {"n_head": 4},
        {"transformer.h.0.attn.c_attn": (36, 12), "h.1.mlp.c_proj": (12, 48)},
    ),
    "bert": (
        {"num_attention_heads": 4},
        {"encoder.layer.2.attention.self.query": (12, 12), "encoder.layer.2.output.dense": (12, 20)},
    ),
    "phi3": (
        {"num_attention_heads": 4},
        {"model.layers.0.mlp.gate_up_proj": (40, 12), "model.layers.0.self_attn.qkv_proj": (36, 12)},
    ),
    "qwen3_5_text": (LINEAR, {"model.layers.1.linear_attn.out_proj": (10, 12)}),
}


def peft_adapter(folder: Path, modules: Mapping[str, tuple[int, int]]) -> Path:
    return write_peft(folder, {m: factors(*shape, 2, seed=i) for i, (m, shape) in enumerate(modules.items())})


def under_gguf_names(adapter: Path, config: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return the first row of A of each tensor of GGUF, as `convert` writes them."""
    (folder / "config.json").write_text(json.dumps(config))
    loratool.convert(adapter, folder / "a.gguf", to="gguf", base=folder / "config.json")
    with loratool.open_adapter(folder / "a.gguf") as found:
        return {f"{module}.weight": update.A[0] for module, update in found.items()}


def moments_of(
    path: Path, sums: Mapping[str, Any], opened: ExitStack, config: Mapping[str, Any] | None = None, adapter: Any = None
) -> InputMoments:
    file = ImatrixFile(write_gguf(path, {name: (values, [1] * len(values)) for name, values in sums.items()}))
    opened.callback(file.close)
    if config is not None:
        return InputMoments.of_model(file, config, "the model")
    from loratool.adapters.formats import open_adapter

    found = open_adapter(adapter)
    opened.callback(found.file.close)
    return InputMoments.of_adapter(file, found)


def expected(A: Tensor) -> Tensor:
    h = A.double().square()
    return (h / h.mean()).clamp(min=1e-3).sqrt().float()


@pytest.mark.parametrize("model_type", MODELS)
def test_a_module_has_the_inputs_of_its_tensors(model_type: str, tmp_path: Path) -> None:
    facts, modules = MODELS[model_type]
    config = {"model_type": model_type, "tie_word_embeddings": False, **facts}
    adapter = peft_adapter(tmp_path / "adapter", modules)
    theirs = under_gguf_names(adapter, config, tmp_path)
    own = load_file(adapter / "adapter_model.safetensors")
    sums = {name: A[None].square() for name, A in theirs.items()}
    with ExitStack() as opened:
        by_config = moments_of(tmp_path / "i.gguf", sums, opened, config)
        by_names = moments_of(tmp_path / "i.gguf", sums, opened, adapter=adapter)
        for module, (out, inputs) in modules.items():
            A = own[f"base_model.model.{module}.lora_A.weight"][0]
            found = by_config.weights(module, (1, out, inputs))
            assert found is not None and np.allclose(found[0], expected(A), rtol=1e-5)
            alone = by_names.weights(module, (1, out, inputs))
            if model_type == "qwen3_5_text":  # the order of its columns is told by a config alone
                assert alone is None
            else:
                assert alone is not None and np.array_equal(alone, found)


def test_gguf_adapters_have_the_names_themselves(tmp_path: Path) -> None:
    facts, modules = MODELS["llama"]
    theirs = under_gguf_names(
        peft_adapter(tmp_path / "adapter", modules),
        {"model_type": "llama", **facts, "tie_word_embeddings": False},
        tmp_path,
    )
    with ExitStack() as opened:
        sums = {name: A[None].square() for name, A in theirs.items()}
        found = moments_of(tmp_path / "i.gguf", sums, opened, adapter=tmp_path / "a.gguf")
        for name, A in theirs.items():
            weights = found.weights(name.removesuffix(".weight"), (1, 7, len(A)))
            assert weights is not None and np.allclose(weights[0], expected(A), rtol=1e-5)
        assert found.weights("token_embd", (1, 12, 30)) is None


def test_experts(tmp_path: Path) -> None:
    """A stack gets a row for each, one expert its own; of square ones no adapter says which side has the inputs."""
    sums = {
        "blk.4.ffn_down_exps.weight": torch.arange(1.0, 13).view(3, 4),
        "blk.4.ffn_gate_exps.weight": torch.ones(3, 6),
    }
    stack, config = (
        "model.layers.4.mlp.experts.down_proj",
        {"model_type": "qwen3_moe", "num_attention_heads": 2, "num_experts": 3},
    )
    with ExitStack() as opened:
        own = moments_of(tmp_path / "i.gguf", sums, opened, config)
        names = moments_of(
            tmp_path / "i.gguf", sums, opened, adapter=peft_adapter(tmp_path / "a", {"a.q_proj": (4, 4)})
        )
        rows = torch.stack([expected(row.sqrt()) for row in sums["blk.4.ffn_down_exps.weight"]])
        for each, sizes in ((own, (3, 6, 4)), (names, (3, 6, 4)), (own, (3, 4, 4))):
            found = each.weights(stack, sizes)
            assert found is not None and np.allclose(found, rows)
        assert names.weights(stack, (3, 4, 4)) is None and names.weights(stack, (3, 4, 6)) is None
        one = names.weights("model.layers.4.mlp.experts.2.down_proj", (1, 6, 4))
        assert one is not None and np.allclose(one, rows[2:])
        for wrong in ((2, 6, 4), (4, 6, 3)):
            with pytest.raises(InputError, match="it belongs to another model"):
                own.weights(stack, wrong)
        with pytest.raises(InputError, match="has 3 matrices in .*, and .*7.down_proj is none of these"):
            names.weights("model.layers.4.mlp.experts.7.down_proj", (1, 6, 4))


def test_llama_4s_stacks_have_either_side(tmp_path: Path) -> None:
    """PEFT takes them as (experts, in, out), so that A of a square stack has its outputs."""
    config = {"model_type": "llama4_text", "num_attention_heads": 2, "num_local_experts": 2}
    with ExitStack() as opened:
        found = moments_of(tmp_path / "i.gguf", {"blk.0.ffn_down_exps.weight": torch.ones(2, 4)}, opened, config)
        assert found.weights("model.layers.0.feed_forward.experts.down_proj", (2, 4, 4)) is None
        assert found.weights("model.layers.0.feed_forward.experts.down_proj", (2, 4, 6)) is None


def test_what_llama_cpp_multiplies_otherwise_has_no_inputs(tmp_path: Path) -> None:
    """The matrices of each head of latent attention, which are multiplied by other states than kv_b_proj is."""
    sizes = {"num_attention_heads": 2, "qk_nope_head_dim": 2, "v_head_dim": 2, "n_routed_experts": 2}
    config = {"model_type": "deepseek_v3", **sizes}
    sums = {"blk.0.attn_k_b.weight": torch.ones(2, 4), "blk.0.attn_v_b.weight": torch.ones(2, 4)}
    with ExitStack() as opened:
        found = moments_of(tmp_path / "i.gguf", sums, opened, config)
        assert found.weights("model.layers.0.self_attn.kv_b_proj", (1, 8, 4)) is None
        with pytest.raises(InputError, match="is it the file of this model") as error:
            found.require_known()
        assert "kv_b_proj" in str(error.value) and "blk.0.attn_k_b" in str(error.value)


def test_image_models_have_none(tmp_path: Path) -> None:
    kohya = write_kohya(
        tmp_path / "a.safetensors", {"down_blocks.0.attentions.0.proj_in": factors(6, 4, 2)}, torch.tensor(1.0)
    )
    with ExitStack() as opened, pytest.raises(InputError, match="image model"):
        moments_of(tmp_path / "i.gguf", {"blk.0.attn_q.weight": torch.ones(1, 4)}, opened, adapter=kohya)
