"""Hold merges in memory to those of files: every kind of adapter, on modules and state dicts, forth and back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, factors, few, load_model, slow, weights, write_model, write_peft
from lib.models.peft_models import (
    DOWN,
    FAMILIES,
    GATE_UP,
    agree,
    answer,
    gemma3,
    gpt_oss,
    kinds,
    kinds_of_families,
    llama,
    llava,
    load,
    mixtral,
    peft,
    qwen2_vl,
    qwen3_moe,
    transformers,
    wrap,
    write_base,
    write_pair,
)
from torch import Tensor

import loratool
from loratool.errors import NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]  # peft's and transformers', of what these tests do on purpose

TYPES = (torch.bfloat16, torch.float16, torch.float32)
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items()}


def differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are not alike in all bits, or that only one of the two has."""
    both = found.keys() & wanted.keys()
    unlike = (name for name in both if not torch.equal(bits(found[name].reshape(-1)), bits(wanted[name].reshape(-1))))
    return [*(found.keys() ^ wanted.keys()), *unlike]


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """What transformers saves, whose names are those of the files and not of the class."""
    model.save_pretrained(folder)
    return load_model(folder)


def hold(model: Any, base: Path, adapter: Path, folder: Path) -> None:
    """Merge in memory as the files were merged, and go back."""
    loratool.merge(base, adapter, folder / "merged", undo=False)
    before, places = copies(model.state_dict()), {n: x.data_ptr() for n, x in model.state_dict().items()}
    live = loratool.live.merge(model, adapter)
    assert differing(saved(model, folder / "saved"), load_model(folder / "merged")) == []
    assert places == {n: x.data_ptr() for n, x in model.state_dict().items()}
    assert live.report.kept is not None and live.nbytes > 0
    live.unmerge()
    assert differing(model.state_dict(), before) == []


@pytest.mark.parametrize(("family", "kind"), [*kinds_of_families()])
def test_every_kind_of_adapter_as_on_files(tmp_path: Path, family: str, kind: str) -> None:
    """The oracle of the files' bits is peft's forward pass, in another test; here it is asked too."""
    names = FAMILIES[family]
    pair = write_pair(tmp_path / "pair", names.make(), **kinds(names)[kind])
    model = load(pair.base, pair.cls)
    with loratool.live.merged(model, pair.adapter):
        assert agree(answer(model), pair.wanted)
    hold(model, pair.base, pair.adapter, tmp_path)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": [GATE_UP, DOWN]}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
MAKERS = {
    **dict.fromkeys((mixtral, qwen3_moe, gpt_oss), EXPERTS),
    **dict.fromkeys((llava, gemma3, qwen2_vl), ATTENTION),
}


@pytest.mark.parametrize("make", few(MAKERS, mixtral, gpt_oss, llava))
def test_names_and_stacks_of_a_class_that_the_files_do_not_have(tmp_path: Path, make: Callable[[], Any]) -> None:
    """A class of transformers 5 has other names, and stacks experts that its files have apart."""
    model = make()
    base = write_base(tmp_path / "base", model)
    wrap(load(base, type(model)), **MAKERS[make]).save_pretrained(tmp_path / "adapter")
    hold(load(base, type(model)), base, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", TYPES)
def test_types_and_tied_heads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family].make(tie_word_embeddings=True)
    base = write_base(tmp_path / "base", model)
    model.to(dtype).save_pretrained(base)
    names = FAMILIES[family]
    config = {"target_modules": [*names.linear], "modules_to_save": [names.norm], "use_dora": True}
    wrap(load(base, type(model)), **config).save_pretrained(tmp_path / "adapter")
    hold(type(model).from_pretrained(base, dtype=dtype), base, tmp_path / "adapter", tmp_path)


def test_ia3_as_on_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama())
    cls = transformers.LlamaForCausalLM
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    wrapped = peft.get_peft_model(load(base, cls), config)
    for name, x in wrapped.named_parameters():
        if "ia3_l" in name:
            x.data.add_(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    hold(load(base, cls), base, tmp_path / "adapter", tmp_path)


def state_dict(dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{name}.weight": weights(48, 32, seed=seed).to(dtype) for seed, name in enumerate((Q, V))}


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_state_dict_of_each_type(tmp_path: Path, dtype: torch.dtype) -> None:
    state = state_dict(dtype) | {"model.norm.weight": weights(48), "model.count": torch.tensor(3)}
    write_model(tmp_path / "base", state, {})
    adapter = write_peft(tmp_path / "adapter", {Q: factors(48, 32, 4), V: factors(48, 32, 4, seed=1)})
    loratool.merge(tmp_path / "base", {adapter: 0.7}, tmp_path / "merged")
    before, version = copies(state), state[f"{Q}.weight"]._version
    live = loratool.live.merge(state, {adapter: 0.7})
    assert differing(state, load_model(tmp_path / "merged")) == []
    assert state[f"{Q}.weight"]._version > version
    live.unmerge()
    assert differing(state, before) == []


@pytest.mark.parametrize(("dtype", "cycles"), [(torch.bfloat16, 100), *(slow(dtype, 1000) for dtype in TYPES)])
def test_cycles_give_all_bits_back(tmp_path: Path, dtype: torch.dtype, cycles: int) -> None:
    """One adapter, and one that is another each time, as in training."""
    state = state_dict(dtype)
    before = copies(state)
    adapter = write_peft(tmp_path / "adapter", {Q: factors(48, 32, 4)})
    for cycle in range(cycles):
        if cycle % 2:
            A, B = factors(48, 32, 4, seed=cycle)
            write_peft(tmp_path / "adapter", {Q: (A, 10 * B)})
        live = loratool.live.merge(state, adapter)
        assert differing(state, before) == [f"{Q}.weight"]
        live.unmerge()
        assert differing(state, before) == []


@pytest.mark.parametrize(("adapters", "swaps"), [(8, 24), slow(50, 400)])
@pytest.mark.slow
def test_adapters_swapped_at_random_against_new_merges(tmp_path: Path, adapters: int, swaps: int) -> None:
    """Of all kinds, on one model: each swap has the bits of a merge of files into the base."""
    names, choose = FAMILIES["llama"], random.Random(5)
    base = write_base(tmp_path / "base", llama())
    cls, of_kinds = transformers.LlamaForCausalLM, [*kinds(names).values()]
    model = cls.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    folders, merged = [], {}
    for number in range(adapters):
        folder = tmp_path / f"adapter{number}"
        wrap(load(base, cls), number, **of_kinds[number * 5 % len(of_kinds)]).save_pretrained(folder)
        loratool.merge(tmp_path / "narrow", folder, tmp_path / f"merged{number}", undo=False)
        merged[folder] = load_model(tmp_path / f"merged{number}")
        folders.append(folder)
    before, live = copies(model.state_dict()), loratool.live.merge(model, folders[0])
    for _ in range(swaps):
        folder = choose.choice(folders)
        live.swap(folder)
        assert differing(model.state_dict(), merged[folder]) == []
    live.unmerge()
    assert differing(model.state_dict(), before) == []


def test_a_swap_of_all_rows_and_of_parts_of_them(tmp_path: Path) -> None:
    """The records of one adapter tile other rows than the blocks of the next: all experts, and one factor of one."""
    model = mixtral()
    base = write_base(tmp_path / "base", model)
    model = load(base, type(model)).to(torch.bfloat16)
    model.save_pretrained(base)
    wrap(load(base, type(model)), **EXPERTS).save_pretrained(tmp_path / "whole")
    expert = "model.layers.0.block_sparse_moe.experts.1"
    write_peft(tmp_path / "part", {f"{expert}.w3": factors(24, 16, 4), f"{expert}.w2": factors(16, 24, 4)})
    before, live = copies(model.state_dict()), loratool.live.merge(model, tmp_path / "whole")
    for name in ("part", "whole", "part"):
        loratool.merge(base, tmp_path / name, tmp_path / "out", force=True)
        live.swap(tmp_path / name)
        assert differing(saved(model, tmp_path / "saved"), load_model(tmp_path / "out")) == []
    live.unmerge()
    assert differing(model.state_dict(), before) == []


def test_options_are_those_of_the_merge_of_files(tmp_path: Path) -> None:
    state = state_dict(torch.bfloat16)
    write_model(tmp_path / "base", state, {})
    one = write_peft(tmp_path / "one", {Q: factors(48, 32, 4), V: factors(48, 32, 4, seed=1)})
    two = write_peft(tmp_path / "two", {V: factors(48, 32, 2, seed=2)})
    options: dict[str, Any] = {"adapters": [(one, 0.5), two], "exclude": "q_proj", "layers": "1"}
    loratool.merge(tmp_path / "base", out=tmp_path / "merged", **options)
    with loratool.live.merged(state, **options, check="sum", workers=1) as live:
        assert differing(state, load_model(tmp_path / "merged")) == []
        assert [row.name for row in live.report.tensors] == [f"{V}.weight"]
        assert [row.weight for row in live.report.adapters] == [0.5, 1.0]
        assert "is kept" in str(live.report) or live.report.document().subject
    assert differing(state, load_model(tmp_path / "base")) == []


@pytest.mark.parametrize("family", ["sdxl", "gpt2", "llama"])
def test_state_dicts_without_a_config(family: str, tmp_path: Path) -> None:
    """SDXL's fused rows, by kohya's names; GPT-2's transposed weights; real files of small models."""
    ending = ".safetensors" if family == "sdxl" else ""
    base, adapter = (FIXTURES / family / f"{name}{ending}" for name in ("base", "adapter"))
    loratool.merge(base, adapter, tmp_path / f"out{ending}", tied="share")
    state = load_model(base)
    before, wanted = copies(state), load_model(tmp_path / f"out{ending}")
    with loratool.live.merged(state, adapter) as live:
        assert live.report.changed
        assert differing(state, wanted) == []
    assert differing(state, before) == []


def test_an_adapter_that_was_started_from_the_base(tmp_path: Path) -> None:
    """PiSSA: the start is subtracted, or the model is the residual."""
    base = write_base(tmp_path / "base", llama())
    cls = transformers.LlamaForCausalLM
    wrapped = wrap(load(base, cls), target_modules=["q_proj"])
    wrapped.save_pretrained(tmp_path / "start")
    wrap(load(base, cls), 7, target_modules=["q_proj"]).save_pretrained(tmp_path / "end")
    config = tmp_path / "end" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    model = load(base, cls)
    with pytest.raises(NeedsFlag, match="initial"):
        loratool.live.merge(model, tmp_path / "end")
    for options in ({"initial": tmp_path / "start"}, {"residual_base": True}):
        loratool.merge(base, tmp_path / "end", tmp_path / "out", force=True, undo=False, **options)
        with loratool.live.merged(model, tmp_path / "end", **options):
            assert differing(saved(model, tmp_path / "saved"), load_model(tmp_path / "out")) == []
    assert differing(saved(model, tmp_path / "saved"), load_model(base)) == []


def test_large_tensors_of_several_blocks(tmp_path: Path) -> None:
    """Rows that do not fit one record, with norms of rows and of columns."""
    for name, shape, dora in (("rows", (4100, 2048), True), ("plain", (2100, 4096), False)):
        state = {"x.weight": weights(*shape).bfloat16()}
        write_model(tmp_path / name, state, {})
        A, B = factors(*shape, 4)
        adapter = write_peft(tmp_path / f"{name} adapter", {"x": (A, B)}, use_dora=dora)
        if dora:
            from safetensors.torch import load_file, save_file

            own = load_file(adapter / "adapter_model.safetensors")
            own["base_model.model.x.lora_magnitude_vector"] = state["x.weight"].float().norm(dim=1) * 1.1
            save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        loratool.merge(tmp_path / name, adapter, tmp_path / f"{name} merged")
        before = copies(state)
        with loratool.live.merged(state, adapter):
            assert differing(state, load_model(tmp_path / f"{name} merged")) == []
        assert differing(state, before) == []
