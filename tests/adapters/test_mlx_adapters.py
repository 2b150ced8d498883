"""Hold MLX's adapters to their definition, on small integers that every float type holds, without mlx."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, load_model, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.adapters.formats import open_adapter

Q, GATE, UP, DOWN = "self_attn.q_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"
LLAMA = {"model_type": "llama", "num_hidden_layers": 5, "tie_word_embeddings": False}
TIED = {**LLAMA, "tie_word_embeddings": True}
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 1}
LORA = {"rank": 2, "scale": 2.0, "dropout": 0.0}


def ints(*shape: int, seed: int = 0, most: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=g).float()


def write_mlx(
    folder: Path, tensors: Mapping[str, Tensor], lora: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """Write a folder as mlx-lm does."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": dict(LORA if lora is None else lora)}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder


def pair(module: str, inp: int, out: int, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {f"{module}.lora_a": ints(inp, rank, seed=seed), f"{module}.lora_b": ints(rank, out, seed=seed + 1)}


def stack(module: str, inp: int, out: int, experts: int = 3, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    A, B = ints(experts, rank, inp, seed=seed), ints(experts, out, rank, seed=seed + 1)
    return {f"{module}.lora_a": A, f"{module}.lora_b": B}


def merged(
    tmp_path: Path, base: Mapping[str, Tensor], adapter: Path, config: Mapping[str, Any] = LLAMA
) -> dict[str, Tensor]:
    model = write_model(tmp_path / "base", base, config)
    loratool.merge(model, adapter, tmp_path / "merged", undo=False)
    return load_model(tmp_path / "merged")


def test_the_product_is_turned_and_multiplied_by_the_scale_itself(tmp_path: Path) -> None:
    module = f"model.layers.0.{Q}"
    tensors = pair(module, 6, 4)
    found = merged(tmp_path, {f"{module}.weight": ints(4, 6, seed=9)}, write_mlx(tmp_path / "a", tensors))
    delta = 2 * (tensors[f"{module}.lora_a"] @ tensors[f"{module}.lora_b"]).T
    assert torch.equal(found[f"{module}.weight"], ints(4, 6, seed=9) + delta)


@pytest.mark.parametrize("config", [LLAMA, TIED])
def test_an_embedding_changes_wherever_its_matrix_is_used(tmp_path: Path, config: dict[str, Any]) -> None:
    base = {"model.embed_tokens.weight": ints(7, 4), **({} if config is TIED else {"lm_head.weight": ints(7, 4)})}
    tensors = pair("model.embed_tokens", 7, 4)
    found = merged(tmp_path, base, write_mlx(tmp_path / "a", tensors), config)
    A, B = tensors.values()
    assert found.keys() == base.keys()  # a tied head stays tied
    assert torch.equal(found["model.embed_tokens.weight"], ints(7, 4) + 2 * A @ B)
    assert config is TIED or torch.equal(found["lm_head.weight"], ints(7, 4))


def test_a_tied_one_is_proven_and_taken_back(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": ints(7, 4).bfloat16(), "model.norm.weight": ints(4).bfloat16()}
    base = write_model(tmp_path / "base", tensors, {**TIED, "architectures": ["LlamaForCausalLM"]})
    adapter = write_mlx(tmp_path / "a", pair("model.embed_tokens", 7, 4))
    loratool.merge(base, adapter, tmp_path / "merged")
    assert loratool.verify(base, adapter, tmp_path / "merged").status == "proven"
    loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.embed_tokens"])
def test_magnitudes_are_of_rows(tmp_path: Path, module: str) -> None:
    """Without a delta, W' is m W / ||W||, here with rows of norm 5 and m of 10 and 5."""
    W = torch.tensor([[3.0, 4.0, 0.0], [0.0, -3.0, 4.0]])
    a, b = (3, 2) if "q_proj" in module else (2, 3)
    tensors = {
        f"{module}.lora_a": ints(a, 2),
        f"{module}.lora_b": torch.zeros(2, b),
        f"{module}.m": torch.tensor([10.0, 5.0]),
    }
    found = merged(tmp_path, {f"{module}.weight": W}, write_mlx(tmp_path / "a", tensors, fine_tune_type="dora"))
    assert torch.equal(found[f"{module}.weight"], W * torch.tensor([[2.0], [1.0]]))


@pytest.mark.parametrize("flat", [False, True])
def test_stacks_of_experts_are_those_of_the_files(tmp_path: Path, flat: bool) -> None:
    switch = "model.layers.0.mlp.switch_mlp"
    sizes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    tensors: dict[str, Tensor] = {}
    for i, (name, (inp, out)) in enumerate(sizes.items()):
        tensors |= stack(f"{switch}.{name}", inp, out, seed=10 * i)
    base = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": ints(out, inp, seed=e)
        for e in range(3)
        for name, (inp, out) in sizes.items()
    }
    stored = {k: v.flatten(0, 1) if flat and k.endswith("lora_a") else v for k, v in tensors.items()}
    found = merged(tmp_path, base, write_mlx(tmp_path / "a", stored), QWEN)
    for name in sizes:
        for e in range(3):
            delta = 2 * tensors[f"{switch}.{name}.lora_b"][e] @ tensors[f"{switch}.{name}.lora_a"][e]
            key = f"model.layers.0.mlp.experts.{e}.{name}.weight"
            assert torch.equal(found[key], base[key] + delta)


def test_a_full_fine_tune_replaces(tmp_path: Path) -> None:
    name = f"model.layers.0.{Q}.weight"
    adapter = write_mlx(tmp_path / "a", {name: ints(4, 6)}, fine_tune_type="full")
    found = merged(tmp_path, {name: ints(4, 6, seed=3), "model.norm.weight": ints(6)}, adapter)
    assert torch.equal(found[name], ints(4, 6)) and torch.equal(found["model.norm.weight"], ints(6))


@pytest.mark.parametrize(("model_type", "name"), [("qwen3_next", "model.norm"), ("gpt2", "model.h.0.attn.c_proj")])
def test_a_full_fine_tune_of_other_numbers_is_refused(tmp_path: Path, model_type: str, name: str) -> None:
    shape = (4,) if "norm" in name else (4, 4)
    adapter = write_mlx(tmp_path / "a", {f"{name}.weight": ints(*shape)}, fine_tune_type="full")
    with pytest.raises(InputError, match=model_type):
        open_adapter(adapter, model={"model_type": model_type})


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "stored", "theirs"),
    [
        ("gemma3", "language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("gemma3", "model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("mistral3", "language_model.model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("qwen2_vl", "model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("qwen3_vl", "model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("llama4", "language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("gptj", "transformer.h.0.attn.q_proj", "model.h.0.attn.q_proj"),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h", "model.h.0.mlp.dense_h_to_4h"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.gate"),
        ("nemotron_h", "backbone.layers.0.mixer.q_proj", "backbone.layers.0.mixer.q_proj"),
        ("lfm2_moe", "model.layers.0.feed_forward.w3", "model.layers.0.feed_forward.up_proj"),
        ("laguna", "model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.mlp.shared_expert.up_proj"),
    ],
)
def test_it_binds_by_mlx_lms_names_and_gets_them(tmp_path: Path, model_type: str, stored: str, theirs: str) -> None:
    config = {"model_type": model_type}
    adapter = write_mlx(tmp_path / "a", tensors := pair(theirs, 6, 4))
    found = merged(tmp_path, {f"{stored}.weight": ints(4, 6)}, adapter, config)
    A, B = tensors.values()
    assert torch.equal(found[f"{stored}.weight"], ints(4, 6) + 2 * (A @ B).T)
    peft = write_peft(tmp_path / "peft", {stored: (A.T, B.T)}, lora_alpha=4)
    loratool.convert(peft, tmp_path / "back", to="mlx", base=tmp_path / "base" / "config.json")
    made = load_file(tmp_path / "back" / "adapters.safetensors")
    assert made.keys() == tensors.keys() and all(torch.equal(made[name], tensors[name]) for name in made)


def test_what_an_mlx_folder_stacks_takes_peft_s_stack(tmp_path: Path) -> None:
    switch = "model.layers.0.mlp.switch_mlp"
    base = {f"{switch}.{name}.weight": ints(2, 4, 6, seed=i) for i, name in enumerate(("gate_proj", "up_proj"))}
    A, B = ints(2 * 2, 6), ints(8, 2 * 2, seed=1)  # two experts of rank 2
    adapter = write_peft(
        tmp_path / "a", {"model.layers.0.mlp.experts": (A, B)}, r=2, lora_alpha=2, target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj"], peft_version="0.19.0",
    )  # fmt: skip
    found = merged(tmp_path, base, adapter, QWEN)
    for e in range(2):
        delta = B.view(8, 2, 2)[:, :, e] @ A.view(2, 2, 6)[e]
        for part, name in enumerate(("gate_proj", "up_proj")):
            key = f"{switch}.{name}.weight"
            assert torch.equal(found[key][e], base[key][e] + delta[4 * part : 4 * part + 4])


def test_gpt2_s_matrices_are_turned_in_a_folder_of_mlx_alone(tmp_path: Path) -> None:
    name = "h.0.attn.c_proj"
    A, B = (tensors := pair(f"model.{name}", 4, 4)).values()
    adapter, delta = write_mlx(tmp_path / "a", tensors), 2 * (A @ B).T
    for folder, key, expected in (("hub", name, delta.T), ("mlx", f"model.{name}", delta)):
        found = merged(tmp_path / folder, {f"{key}.weight": ints(4, 4)}, adapter, {"model_type": "gpt2"})
        assert torch.equal(found[f"{key}.weight"], ints(4, 4) + expected)


# --- writing -------------------------------------------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_the_config_names_exactly_the_modules(tmp_path: Path) -> None:
    modules = {f"model.layers.{i}.{Q}": factors(6, 8, 4, seed=i) for i in (0, 2)}
    peft = write_peft(tmp_path / "peft", modules, lora_alpha=8, base_model_name_or_path="org/model")
    loratool.convert(peft, tmp_path / "a", to="mlx")
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": sorted(modules)}
    rest = {"fine_tune_type": "lora", "num_layers": 3, "model": "org/model"}
    assert config_of(tmp_path / "a") == {**rest, "lora_parameters": lora}
    base = write_model(tmp_path / "base", {}, LLAMA) / "config.json"
    loratool.convert(peft, tmp_path / "b", to="mlx", base=base)
    assert config_of(tmp_path / "b")["num_layers"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    modules = {f"model.layers.{i}.{Q}": factors(6, 8, 4, seed=i, dtype=dtype) for i in (0, 2)}
    peft = write_peft(tmp_path / "peft", modules, lora_alpha=3)
    report = loratool.convert(peft, tmp_path / "mlx", to="mlx")
    assert {module.how for module in report.modules} == {"exact"}
    assert report.notes == ("the module names are copied unchanged; with --base BASE they become mlx-lm's",)
    loratool.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    one, two = (load_model(folder) for folder in (peft, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert open_adapter(tmp_path / "back").updates[f"model.layers.0.{Q}"].scale == 0.75


def test_other_scales_go_into_B_and_smaller_ranks_get_zeros(tmp_path: Path) -> None:
    one, two = f"model.layers.0.{Q}", f"model.layers.1.{Q}"
    modules = {
        one: factors(6, 8, 4),
        two: factors(6, 8, 3, seed=1),
        "model.layers.2.mlp.up_proj": factors(6, 8, 4, seed=2),
    }
    pattern = {"rank_pattern": {two: 3}, "alpha_pattern": {two: 2}}
    peft = write_peft(tmp_path / "peft", modules, lora_alpha=2, **pattern)
    report = loratool.convert(peft, tmp_path / "mlx", to="mlx")
    rows = {module.name: module for module in report.modules}
    assert rows[one].how == "exact" and "zeros" in report.notes[0]
    made = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert made[f"{two}.lora_a"].shape == (8, 4) and made[f"{two}.lora_b"].shape == (4, 6)
    assert not made[f"{two}.lora_a"][:, 3].any() and not made[f"{two}.lora_b"][3].any()
    assert config_of(tmp_path / "mlx")["lora_parameters"]["scale"] == 0.5
    true = 2 / 3 * modules[two][1].double() @ modules[two][0].double()
    found = 0.5 * (made[f"{two}.lora_a"].double() @ made[f"{two}.lora_b"].double()).T
    assert torch.allclose(found, true, rtol=1e-6) and 0 < rows[two].error < 1e-7


def test_a_power_of_two_folds_exactly(tmp_path: Path) -> None:
    one, two = f"model.layers.0.{Q}", f"model.layers.1.{Q}"
    modules = {one: factors(6, 8, 4), two: factors(6, 8, 4, seed=1)}
    peft = write_peft(tmp_path / "peft", modules, lora_alpha=4, alpha_pattern={two: 16})
    report = loratool.convert(peft, tmp_path / "mlx", to="mlx")
    assert [(row.how, row.error) for row in report.modules] == [("exact", 0.0), ("folded", 0.0)]
    made = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert torch.equal(made[f"{two}.lora_b"], 4 * modules[two][1].T)


def peft_experts(folder: Path, owner: str, version: str = "0.19.0") -> tuple[Path, Tensor, Tensor]:
    """Write factors of rank 2 of `gate_up_proj`, of three experts (8, 6), with PEFT's names and order."""
    A, B = factors(8, 6, 6)[0], factors(8, 6, 6)[1]
    path = write_peft(
        folder, {owner: (A, B)}, r=2, lora_alpha=2, target_modules=[],
        target_parameters=[f"{owner}.gate_up_proj".removeprefix("model.layers.0.")], peft_version=version,
    )  # fmt: skip
    return path, A.view(3, 2, 6), B.view(8, 2, 3).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("model_type", "owner", "theirs", "rows"),
    [
        ("qwen3_moe", "mlp.experts", "mlp.switch_mlp", (slice(0, 4), slice(4, 8))),
        ("mixtral", "mlp.experts", "block_sparse_moe.switch_mlp", (slice(0, 4), slice(4, 8))),
        ("dots1", "mlp.experts", "mlp.experts", (slice(0, 4), slice(4, 8))),
        ("gpt_oss", "mlp.experts", "mlp.experts", (slice(0, None, 2), slice(1, None, 2))),
    ],
)
def test_stacks_go_to_mlx_s_and_come_back(
    tmp_path: Path, model_type: str, owner: str, theirs: str, rows: tuple[slice, slice]
) -> None:
    peft, A, B = peft_experts(tmp_path / "peft", f"model.layers.0.{owner}")
    base = write_model(tmp_path / "base", {}, {"model_type": model_type}) / "config.json"
    report = loratool.convert(peft, tmp_path / "mlx", to="mlx", base=base)
    assert [row.how for row in report.modules] == ["exact"]
    made = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for name, part in zip(("gate_proj", "up_proj"), rows, strict=True):
        assert torch.equal(made.pop(f"model.layers.0.{theirs}.{name}.lora_a"), A)
        assert torch.equal(made.pop(f"model.layers.0.{theirs}.{name}.lora_b"), B[:, part])
    assert not made
    back = open_adapter(tmp_path / "mlx", model={"model_type": model_type})
    update: Any = back.load(back.updates[f"model.layers.0.{owner}.gate_up_proj"])
    ours = open_adapter(peft)
    other: Any
    (other,) = map(ours.load, ours.updates.values())
    assert update.A.form == other.A.form and update.B.form == other.B.form
    assert np.array_equal(update.A.bits, other.A.bits) and np.array_equal(update.B.bits, other.B.bits)


def test_llama_cpp_gets_the_same_from_it_as_from_peft(tmp_path: Path) -> None:
    config = {
        **QWEN, "architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 2, "num_key_value_heads": 2,
        "hidden_size": 6, "moe_intermediate_size": 4, "num_experts": 3, "head_dim": 4, "vocab_size": 10,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    base = write_model(tmp_path / "base", {}, config) / "config.json"
    peft, _, _ = peft_experts(tmp_path / "peft", "model.layers.0.mlp.experts")
    loratool.convert(peft, tmp_path / "mlx", to="mlx", base=base)
    files = {name: tmp_path / f"{name}.gguf" for name in ("peft", "mlx")}
    for name, file in files.items():
        loratool.convert(tmp_path / name, file, to="gguf", base=base)
    assert files["peft"].read_bytes() == files["mlx"].read_bytes()
    loratool.convert(files["peft"], tmp_path / "back", to="mlx", base=base)
    one, two = (load_file(tmp_path / name / "adapters.safetensors") for name in ("mlx", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_llama_4_s_stacks_lie_otherwise_than_peft_takes_them(tmp_path: Path) -> None:
    """They are (expert, in, out), and PEFT 0.19 takes them for (expert, out, in): its B A is our (B A)^T."""
    owner = "language_model.model.layers.0.feed_forward.experts"
    A, B = factors(6, 8, 6)[0], factors(6, 8, 6)[1]
    peft = write_peft(
        tmp_path / "peft", {owner: (A, B)}, r=2, lora_alpha=2, target_modules=[],
        target_parameters=["feed_forward.experts.gate_up_proj"], peft_version="0.19.0",
    )  # fmt: skip
    base = write_model(tmp_path / "base", {}, {"model_type": "llama4"}) / "config.json"
    loratool.convert(peft, tmp_path / "mlx", to="mlx", base=base)
    made = load_file(tmp_path / "mlx" / "adapters.safetensors")
    delta = torch.stack([B.view(6, 2, 3)[:, :, e] @ A.view(3, 2, 8)[e] for e in range(3)]).mT  # (E, out, in)
    for part, name in enumerate(("gate_proj", "up_proj")):
        found = made[f"{owner}.{name}.lora_b"] @ made[f"{owner}.{name}.lora_a"]
        assert torch.allclose(found, delta[:, 4 * part : 4 * part + 4], atol=1e-7)


def test_factors_of_their_own_stand_one_after_the_other(tmp_path: Path) -> None:
    switch = "model.layers.0.mlp.switch_mlp"
    tensors = {**stack(f"{switch}.gate_proj", 6, 4), **stack(f"{switch}.up_proj", 6, 4, seed=5)}
    adapter = open_adapter(write_mlx(tmp_path / "a", tensors), model=QWEN)
    update = adapter.updates["model.layers.0.mlp.experts.gate_up_proj"]
    assert (update.rank, update.experts, update.shape) == (4, 3, (3, 8, 6))


# name -> what PEFT's adapter has, of which model, and what is said of it
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tied head": ({"lm_head": (6, 8)}, TIED, "a head that is tied"),
    "tied embedding": ({"model.embed_tokens": (8, 6)}, TIED, "an embedding that the head is tied to"),
    "tower": ({"model.vision_tower.layers.0.q_proj": (6, 8)}, {"model_type": "gemma3"}, "of a tower"),
    "kv_b": ({"model.layers.0.self_attn.kv_b_proj": (6, 8)}, {"model_type": "deepseek_v3"}, "does not have"),
    "scaled": ({"model.layers.0.self_attn.q_proj": (6, 8)}, {"model_type": "falcon_h1"}, "multiplies"),
    "one expert": ({"model.layers.0.mlp.experts.0.up_proj": (6, 8)}, {**QWEN, "num_hidden_layers": 2}, "of one expert"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_mlx_cannot_hold_is_named(tmp_path: Path, case: str) -> None:
    modules, config, said = MISFITS[case]
    both = {**{name: factors(*shape, 4) for name, shape in modules.items()}, f"model.layers.1.{Q}": factors(6, 8, 4)}
    peft = write_peft(tmp_path / "peft", both)
    if case == "tied embedding":
        tensors = load_file(peft / "adapter_model.safetensors")
        renamed = {
            k.replace("embed_tokens.lora_A.weight", "embed_tokens.lora_embedding_A").replace(
                "embed_tokens.lora_B.weight", "embed_tokens.lora_embedding_B"
            ): v
            for k, v in tensors.items()
        }
        save_file(renamed, peft / "adapter_model.safetensors")
    base = write_model(tmp_path / "base", {}, config) / "config.json"
    error = InputError if case == "scaled" else NeedsFlag  # nothing is left of it
    with pytest.raises(error, match=said) as raised:
        loratool.convert(peft, tmp_path / "out", to="mlx", base=base)
    if case == "scaled":
        return
    words = shlex.split(raised.value.remedy or "")
    exclude = [after for word, after in pairwise(words) if word == "--exclude"]
    loratool.convert(peft, tmp_path / "out", to="mlx", base=base, exclude=exclude)


def test_only_the_model_tells_of_stacks(tmp_path: Path) -> None:
    peft, _, _ = peft_experts(tmp_path / "peft", "model.layers.0.mlp.experts")
    with pytest.raises(NeedsFlag, match="only the model tells"):
        loratool.convert(peft, tmp_path / "out", to="mlx")
    adapter = write_mlx(tmp_path / "a", stack("model.layers.0.mlp.switch_mlp.up_proj", 6, 4))
    with pytest.raises(NeedsFlag, match="only the model's config tells"):
        loratool.convert(adapter, tmp_path / "out", to="peft")
    loratool.resize(adapter, tmp_path / "small", rank=1)  # in its own names
    made = load_file(tmp_path / "small" / "adapters.safetensors")
    assert made["model.layers.0.mlp.switch_mlp.up_proj.lora_a"].shape == (3, 1, 6)


def test_there_are_none_of_image_models(tmp_path: Path) -> None:
    module = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    peft = write_peft(tmp_path / "peft", {module: factors(8, 8, 4)})
    with pytest.raises(InputError, match="for language models"):
        loratool.convert(peft, tmp_path / "out", to="mlx")


def test_other_commands_write_it(tmp_path: Path) -> None:
    module, other = f"model.layers.0.{Q}", "model.layers.0.mlp.up_proj"
    W = {f"{module}.weight": torch.randn(6, 8), f"{other}.weight": torch.randn(10, 8)}
    B, A = torch.randn(6, 2) / 9, torch.randn(2, 8) / 9
    base = write_model(tmp_path / "base", W, LLAMA)
    tuned = write_model(tmp_path / "tuned", {**W, f"{module}.weight": W[f"{module}.weight"] + B @ A}, LLAMA)
    loratool.extract(base, tuned, tmp_path / "extracted", rank=2, to="mlx")
    made = load_file(tmp_path / "extracted" / "adapters.safetensors")
    config = config_of(tmp_path / "extracted")
    assert torch.allclose((made[f"{module}.lora_a"] @ made[f"{module}.lora_b"]).T, B @ A, atol=1e-5)
    assert config["lora_parameters"]["keys"] == [module] and config["num_layers"] == 5
    loratool.combine([tmp_path / "extracted", (tmp_path / "extracted", 2.0)], tmp_path / "sum")
    both = load_file(tmp_path / "sum" / "adapters.safetensors")
    scale = config_of(tmp_path / "sum")["lora_parameters"]["scale"]
    assert torch.allclose(scale * (both[f"{module}.lora_a"] @ both[f"{module}.lora_b"]).T, 3 * B @ A, atol=1e-5)


def test_started_ones_have_mlx_s_names_and_one_scale(tmp_path: Path) -> None:
    path = "model.language_model.layers.0"
    W = {f"{path}.{name}.weight": torch.randn(6, 8) for name in ("self_attn.q_proj", "mlp.up_proj")}
    base = write_model(
        tmp_path / "base", W, {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    )
    loratool.init(base, tmp_path / "a", rank=4, rank_pattern={"up_proj": 2}, alpha=4, to="mlx")
    made = load_file(tmp_path / "a" / "adapters.safetensors")
    theirs = [f"language_model.model.layers.0.{name}" for name in ("mlp.up_proj", "self_attn.q_proj")]
    assert config_of(tmp_path / "a")["lora_parameters"]["keys"] == theirs
    assert {made[f"{name}.lora_a"].shape for name in theirs} == {(8, 4)}


def test_dora_goes_there_and_back(tmp_path: Path) -> None:
    module = f"model.layers.0.{Q}"
    peft = write_peft(tmp_path / "peft", {module: factors(6, 8, 4)}, use_dora=True)
    tensors = load_file(peft / "adapter_model.safetensors")
    tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.arange(1.0, 7.0)
    save_file(tensors, peft / "adapter_model.safetensors")
    loratool.convert(peft, tmp_path / "mlx", to="mlx")
    assert config_of(tmp_path / "mlx")["fine_tune_type"] == "dora"
    assert torch.equal(load_file(tmp_path / "mlx" / "adapters.safetensors")[f"{module}.m"], torch.arange(1.0, 7.0))
    loratool.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_a_folder_of_numbers_has_the_hub_s_experts(tmp_path: Path, model_type: str, dtype: str) -> None:
    owner = "model.layers.0.block_sparse_moe" if model_type == "mixtral" else "model.layers.0.mlp"
    theirs = "w1 w3 w2".split() if model_type == "mixtral" else "gate_proj up_proj down_proj".split()
    switch = {name: ints(3, 4, 4, seed=i) for i, name in enumerate(("gate_proj", "up_proj", "down_proj"))}
    tensors = {f"{owner}.switch_mlp.{name}.weight": W for name, W in switch.items()}
    rest = {f"{owner}.gate.weight": ints(3, 4), "model.norm.weight": ints(4)}
    config = {"model_type": model_type, "num_hidden_layers": 1}
    base = write_model(tmp_path / "base", {**tensors, **rest}, config, 2, {"format": "mlx"})
    report = loratool.convert_model(base, tmp_path / "out", dtype=dtype)
    made = load_model(tmp_path / "out")
    if dtype == "keep":
        assert made.keys() == {*tensors, *rest}
        return
    split = {
        f"{owner}.experts.{e}.{other}.weight": W[e]
        for W, other in zip(switch.values(), theirs, strict=True)
        for e in range(3)
    }
    assert "3 stacks" in report.warnings[0]
    assert made.keys() == {*split, *rest}
    assert all(torch.equal(made[name].float(), W) for name, W in {**split, **rest}.items())


@pytest.mark.parametrize(
    ("model_type", "said"), [("deepseek_v3", "keeps mlx-lm's names"), ("qwen3_next", "norms plus 1")]
)
def test_a_folder_that_keeps_mlx_s_names_is_told(tmp_path: Path, model_type: str, said: str) -> None:
    tensors = {"model.layers.0.mlp.switch_mlp.up_proj.weight": ints(3, 4, 4)}
    base = write_model(tmp_path / "base", tensors, {"model_type": model_type}, metadata={"format": "mlx"})
    report = loratool.convert_model(base, tmp_path / "out", dtype="bf16")
    assert said in report.warnings[0] and load_model(tmp_path / "out").keys() == tensors.keys()


def test_multiplied_weights_take_no_adapter(tmp_path: Path) -> None:
    name = f"model.layers.0.{Q}"
    base = write_model(
        tmp_path / "base", {f"{name}.weight": ints(6, 8)}, {"model_type": "falcon_h1"}, metadata={"format": "mlx"}
    )
    with pytest.raises(InputError, match="has multiplied"):
        loratool.merge(base, write_peft(tmp_path / "a", {name: factors(6, 8, 4)}), tmp_path / "out")
    with pytest.raises(InputError, match="multiplies"):
        open_adapter(write_mlx(tmp_path / "mlx", pair(name, 8, 6)), model={"model_type": "falcon_h1"})


# --- bad input -----------------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alpha in place of scale": ({"rank": 2, "alpha": 4, "dropout": 0.0}, NeedsFlag, "has alpha, which mlx-lm"),
    "no scale": ({"rank": 2, "dropout": 0.0}, NeedsFlag, "no config that says the scale"),
    "nan": ({**LORA, "scale": float("nan")}, InputError, "scale nan"),
    "inf": ({**LORA, "scale": float("inf")}, InputError, "scale inf"),
    "huge": ({**LORA, "scale": 10**400}, InputError, "scale 1000"),
    "text": ({**LORA, "scale": "2"}, InputError, "scale '2'"),
    "rank of text": ({**LORA, "rank": "2"}, InputError, "rank '2'"),
    "rank 0": ({**LORA, "rank": 0}, InputError, "rank 0"),
    "other rank": ({**LORA, "rank": 4}, InputError, "the config says rank 4"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_is_wrong_is_told(tmp_path: Path, case: str) -> None:
    lora, error, said = BAD_CONFIGS[case]
    tensors = {**pair(f"model.layers.0.{Q}", 6, 4)}
    with pytest.raises(error, match=said):
        open_adapter(write_mlx(tmp_path / "a", tensors, lora))
    with pytest.raises(error, match=said):
        open_adapter(write_mlx(tmp_path / "b", stack("l.mlp.switch_mlp.up_proj", 6, 4), lora), model=QWEN)


@pytest.mark.parametrize("lacks", ["rank", "dropout"])
def test_what_only_mlx_lm_needs_is_noted(tmp_path: Path, lacks: str) -> None:
    lora = {key: value for key, value in LORA.items() if key != lacks}
    adapter = open_adapter(write_mlx(tmp_path / "a", pair(Q, 6, 4), lora))
    assert f"no {lacks}" in adapter.notes[0] and adapter.updates[Q].scale == 2.0


BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "half a pair": ({"q.lora_a": ints(6, 2)}, "lora", "no partner"),
    "half a stack": ({"switch_mlp.up_proj.lora_b": ints(3, 4, 2)}, "lora", "lora_a and lora_b"),
    "other ranks": ({"q.lora_a": ints(6, 2), "q.lora_b": ints(3, 4)}, "lora", "do not share a rank"),
    "other experts": ({"s.lora_a": ints(3, 2, 6), "s.lora_b": ints(2, 4, 2)}, "lora", "not a stack"),
    "empty": ({"q.lora_a": ints(6, 0), "q.lora_b": ints(0, 4)}, "lora", "do not share a rank|rank"),
    "a vector": ({"q.lora_a": ints(6), "q.lora_b": ints(2, 4)}, "lora", "not a low-rank pair"),
    "a stranger": ({**pair("q", 6, 4), "q.bias": ints(4)}, "lora", "not a tensor of MLX's LoRA"),
    "m and no DoRA": ({**pair("q", 6, 4), "q.m": ints(4)}, "lora", "has an m"),
    "DoRA without m": (pair("q", 6, 4), "dora", "has no m"),
    "m of other rows": ({**pair("q", 6, 4), "q.m": ints(5)}, "dora", "5 magnitudes for 4"),
    "factors in full": (pair("q", 6, 4), "full", "is a factor"),
    "unknown kind": (pair("q", 6, 4), "ia3", "is none of lora, dora, full"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_wrong_are_told(tmp_path: Path, case: str, run: Callable[..., Any]) -> None:
    tensors, kind, said = BAD_TENSORS[case]
    adapter = write_mlx(tmp_path / "a", tensors, fine_tune_type=kind)
    with pytest.raises(InputError, match=said):
        open_adapter(adapter)
    assert run("inspect", adapter).exit_code in (0, 3)


def test_a_foreign_prefix_binds_nothing(tmp_path: Path) -> None:
    adapter = write_mlx(tmp_path / "a", pair(f"other.layers.0.{Q}", 6, 4))
    with pytest.raises(InputError, match="not in the base|is in the base"):
        merged(tmp_path, {f"model.layers.0.{Q}.weight": ints(4, 6)}, adapter)


def test_its_config_and_peft_s_are_told_apart(tmp_path: Path) -> None:
    mlx, peft = write_mlx(tmp_path / "mlx", pair(Q, 6, 4)), write_peft(tmp_path / "peft", {Q: factors(6, 8, 4)})
    swapped = (mlx / "adapter_config.json").read_text(), (peft / "adapter_config.json").read_text()
    (peft / "adapter_config.json").write_text(swapped[0])
    (mlx / "adapter_config.json").write_text(swapped[1])
    with pytest.raises(InputError, match="is MLX's, but its tensors are not"):
        open_adapter(peft)
    with pytest.raises(InputError, match="is not MLX's, although its tensors are"):
        open_adapter(mlx)


def test_pefts_fields_in_its_config_say_nothing(tmp_path: Path) -> None:
    """mlx-lm does not read them, as in a folder that has served for both."""
    module = f"model.layers.0.{Q}"
    peft = {"r": 8, "lora_alpha": 99, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "target_modules": ["x"]}
    source = write_mlx(tmp_path / "a", pair(module, 6, 4), **peft)
    loratool.convert(source, tmp_path / "b", to="peft")
    (update,) = open_adapter(tmp_path / "b").updates.values()
    assert (update.module, update.rank, update.scale) == (module, 2, 2.0)


def test_a_file_without_its_config_needs_alpha(tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "a", pair(Q, 6, 4))
    checkpoint = folder / "0000100_adapters.safetensors"
    (folder / "adapters.safetensors").rename(checkpoint)
    assert open_adapter(checkpoint).updates[Q].scale == 2.0
    with pytest.raises(UsageError, match="contradicts"):
        open_adapter(checkpoint, alpha=3.0)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NeedsFlag, match="alpha"):
        open_adapter(checkpoint)
    assert open_adapter(checkpoint, alpha=3.0).updates[Q].scale == 1.5


def test_the_alpha_of_mlx_vlm_is_asked_for(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Its config's alpha was the scale before 0.5.0, and is divided by the rank since: no file says which."""
    folder, A, B = tmp_path / "a", ints(6, 2), ints(2, 4)
    folder.mkdir()
    save_file({f"language_model.{Q}.A": A, f"language_model.{Q}.B": B}, folder / "adapters.safetensors")
    with pytest.raises(InputError, match="names of mlx-vlm's LoRA"):
        open_adapter(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"rank": 2, "alpha": 16, "dropout": 0.1}))
    with pytest.raises(NeedsFlag, match=r"is the scale before 0\.5\.0, and divided by the rank since") as caught:
        open_adapter(folder)
    assert "--alpha 32 if it was trained before 0.5.0, --alpha 16 if since" in str(caught.value.remedy)
    assert "--alpha 32" in run("inspect", folder).stdout
    save_file({f"language_model.{Q}.weight": torch.zeros(4, 6)}, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", folder, tmp_path / "out.safetensors", alpha=16, undo=False)
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"language_model.{Q}.weight"], 8 * (A @ B).T)
    config.write_text(json.dumps({"rank": 3, "alpha": 16, "dropout": 0.1}))
    with pytest.raises(InputError, match="rank"):
        open_adapter(folder, 16.0)


def test_a_full_fine_tune_alone_is_not_to_be_excluded(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Nothing would be left, so that no flag helps."""
    adapter = write_mlx(tmp_path / "a", {f"model.layers.0.{Q}.weight": ints(4, 6)}, fine_tune_type="full")
    model = tmp_path / "config.json"
    model.write_text(json.dumps(LLAMA))
    for to, base in (("mlx", ()), ("gguf", ("--base", model)), ("loralib", ()), ("peft", ())):
        out = tmp_path / ("out.gguf" if to == "gguf" else "out.safetensors")
        result = run("convert", adapter, "--to", to, "-o", out, *base)
        assert result.exit_code == 3 and "to convert" in result.stderr, (to, result.stderr)
        assert "--exclude" not in result.stderr


def test_a_full_fine_tune_of_codes_is_refused(tmp_path: Path) -> None:
    """A quantized layer has its codes, scales and biases in the file."""
    stem = f"model.layers.0.{Q}"
    tensors = {f"{stem}.weight": torch.ones(4, 2, dtype=torch.uint32), f"{stem}.scales": ints(4, 1)}
    with pytest.raises(InputError, match="quantized model") as refused:
        open_adapter(write_mlx(tmp_path / "a", tensors, fine_tune_type="full"))
    assert refused.value.culprit == f"{stem}.weight"
