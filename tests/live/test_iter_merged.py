"""Hold that `iter_merged` yields the tensors of the file that `merge` writes, and so feeds vLLM's `load_weights`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, factors, few, load_model, weights, write_model, write_peft
from lib.models import coded_models
from lib.models.gguf_models import write_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.errors import InputError, NeedsFlag

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"

BEYOND = ("ct_mxfp4", "ct_mxfp8")  # they have numbers that bfloat16 does not


def hold(base: Path, adapters: Any, out: Path, **options: Any) -> None:
    loratool.merge(base, adapters, out, undo=False, **options)
    wanted, found = load_model(out), dict(loratool.iter_merged(base, adapters, **options))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert torch.equal(bits(found[name].reshape(-1)), bits(x.reshape(-1))), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", few(["keep", "bf16", "fp16", "fp32"], "keep", "bf16"))
def test_the_tensors_are_those_of_the_file(family: str, dtype: str, tmp_path: Path) -> None:
    adapters = {FIXTURES / family / "adapter": 0.7}
    hold(FIXTURES / family / "base", adapters, tmp_path / "out", dtype=dtype, tied="share")


def test_shards_options_and_an_untied_head(tmp_path: Path) -> None:
    state = {"model.embed_tokens.weight": weights(32, 16), "model.layers.0.mlp.up_proj.weight": weights(24, 16)}
    state = {n: x.bfloat16() for n, x in state.items()} | {"model.steps": torch.tensor([3, 4])}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    write_model(tmp_path / "base", state, config, shards=3)
    head = write_peft(tmp_path / "head", {"lm_head": factors(32, 16, 4)})
    up = write_peft(tmp_path / "up", {"model.layers.0.mlp.up_proj": factors(24, 16, 4)})
    hold(tmp_path / "base", [head, (up, 0.5)], tmp_path / "out", workers=2)
    hold(tmp_path / "base", [head, (up, 0.5)], tmp_path / "some", exclude="up_proj", dtype="fp32")


def test_a_vocabulary_of_other_rows(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": weights(24, 8), "model.x.weight": weights(6, 4)}
    write_model(tmp_path / "base", tensors, {"model_type": "llama", "vocab_size": 24})
    adapter = write_peft(tmp_path / "adapter", {"model.x": factors(6, 4, 2)}, modules_to_save=["embed_tokens"])
    own = load_file(adapter / "adapter_model.safetensors")
    (adapter / "tokenizer_config.json").write_text("{}")
    for rows in (20, 30):
        own["base_model.model.model.embed_tokens.weight"] = weights(rows, 8, seed=7)
        save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        hold(tmp_path / "base", adapter, tmp_path / f"out{rows}")


@pytest.mark.parametrize("vector", coded_models.EACH)
def test_codes_stay_codes_and_touched_ones_become_numbers(vector: str, tmp_path: Path) -> None:
    coded_models.write_base(vector, tmp_path / "base")
    adapter, _ = coded_models.write_adapter(tmp_path / "adapter", coded_models.numbers_of(tmp_path / "base"))
    if vector in BEYOND:
        with pytest.raises(InputError, match="become infinite in BF16"):
            dict(loratool.iter_merged(tmp_path / "base", adapter))
        return
    hold(tmp_path / "base", adapter, tmp_path / "out")


def test_a_large_tensor_in_several_blocks(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"x.weight": weights(2100, 4096).bfloat16(), "y": weights(3)}, {})
    hold(
        tmp_path / "base", write_peft(tmp_path / "adapter", {"x": factors(2100, 4096, 4)}), tmp_path / "out", workers=2
    )


class Packed(nn.Module):
    """A model as vLLM has it: q, k and v are rows of one parameter, and `load_weights` puts each where it belongs."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        self.packed: dict[str, Tensor] = {}
        rows: dict[str, list[int]] = {}
        for name, shape in shapes.items():
            rows.setdefault(self.place(name)[0], []).append(shape[0])
        for name, shape in shapes.items():
            self.packed[self.place(name)[0]] = torch.zeros(sum(rows[self.place(name)[0]]), *shape[1:]).bfloat16()
        self.shapes = shapes

    def place(self, name: str) -> tuple[str, int]:
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            if part in name:
                return name.replace(part, "qkv_proj"), i
        return name, 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, x in weights:
            where, part = self.place(name)
            before = [n for n in self.shapes if self.place(n)[0] == where and self.place(n)[1] < part]
            start = sum(self.shapes[n][0] for n in before)
            self.packed[where][start : start + len(x)].copy_(x)
            loaded.add(where)
        return loaded


def test_it_feeds_a_server_without_a_file(tmp_path: Path) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "out")
    wanted = load_model(tmp_path / "out")
    shapes = {name: x.shape for name, x in wanted.items()}
    from_file, from_memory = Packed(shapes), Packed(shapes)
    from_file.load_weights(wanted.items())
    assert from_memory.load_weights(loratool.iter_merged(BASE, ADAPTER)) == from_file.packed.keys()
    assert all(torch.equal(from_memory.packed[name], x) for name, x in from_file.packed.items())


def test_one_tensor_at_a_time_and_threads_as_before() -> None:
    threads = torch.get_num_threads()
    names = []
    for name, x in loratool.iter_merged(BASE, ADAPTER, workers=2):
        assert torch.get_num_threads() == threads
        x.zero_()  # it is the caller's
        names.append(name)
    assert names == [*loratool.open_checkpoint(BASE)]


def test_errors_come_before_the_first_tensor(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        loratool.iter_merged(BASE, FIXTURES / "gpt2" / "adapter")
    with pytest.raises(InputError, match="is an adapter"):
        loratool.iter_merged(ADAPTER, BASE)
    A, B = factors(24, 16, 4)
    write_model(tmp_path / "base", {"x.weight": weights(24, 16).half()}, {})
    large = write_peft(tmp_path / "large", {"x": (A * 1e4, B * 1e4)})
    with pytest.raises((InputError, NeedsFlag), match='become infinite in F16\ndtype="fp32" holds them'):
        dict(loratool.iter_merged(tmp_path / "base", large))
    hold(tmp_path / "base", large, tmp_path / "out", dtype="fp32")


def test_what_has_no_tensors_of_torch_is_named(tmp_path: Path) -> None:
    state = {"blk.0.attn_q.weight": weights(32, 32), "token_embd.weight": weights(8, 32)}
    write_llama(tmp_path / "base.gguf", state)
    adapter = write_peft(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": factors(32, 32, 4)})
    with pytest.raises(InputError, match=r"base.gguf: is a GGUF model, whose blocks are no tensors\nmerge it into"):
        loratool.iter_merged(tmp_path / "base.gguf", adapter)
