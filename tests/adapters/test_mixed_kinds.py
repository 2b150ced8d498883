"""Refuse files whose tensors or config contradict each other, so that none of them is left out without a word."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.files.lycoris_files import KINDS, Numbers, Peft, Roles, base_of, peft_of, roles_of, write_lycoris
from lib.oracles.dense_oracle import merged_codes, peft_updates
from lib.oracles.fractions_oracle import count_wrong
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.stacked import stack_factors
from loratool.adapters.updates.lokr import LoKr
from loratool.errors import InputError, LoratoolError
from loratool.numerics.tensors import numbers_of

FP32 = torch.float32
N = Numbers(FP32)
LORA = Peft(
    "linear", {"lora_A.weight": N(3, 6), "lora_B.weight": N(25, 3)}, {"peft_type": "LORA", "r": 3, "lora_alpha": 4}
)
TOKENS = Peft(
    "linear",
    {"token_adapter.trainable_tokens_delta": N(2, 6)},
    {**LORA.config, "trainable_token_indices": [1, 3]},
)
EMBEDDING = Peft("linear", {"lora_embedding_A": N(3, 25), "lora_embedding_B": N(6, 3)}, LORA.config)
BIAS = Peft("linear", {**LORA.roles, "lora_B.bias": N(25)}, {**LORA.config, "lora_bias": True})


def peft(name: str) -> Peft:
    own = {"lora": LORA, "tokens": TOKENS, "embedding": EMBEDDING, "bias": BIAS}
    return own[name] if name in own else peft_of(name, FP32)


def refuse(tmp_path: Path, layer: str, adapter: Path, match: str) -> None:
    base = base_of(layer, FP32).write(tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=match):
        loratool.merge(base, adapter, tmp_path / "out.safetensors")
    assert not [*tmp_path.glob("out*")]


@pytest.mark.parametrize("container", ["kohya", "bare"])
@pytest.mark.parametrize(
    ("kind", "more", "match"),
    [
        ("lokr full", {"lokr_t2": N(2, 2, 3, 2)}, "core"),
        ("lokr conv full", {"lokr_t2": N(2, 2, 3, 2)}, "core"),
        ("glora added", {"lora_up.weight": N(25, 3), "lora_down.weight": N(3, 6)}, "GLoRA and of LoRA"),
        ("ia3 out", {"dora_scale": N(25, 1)}, "which cannot be combined"),
        ("ia3 conv out", {"dora_scale": N(10, 1, 1, 1)}, "which cannot be combined"),
        ("norm", {"dora_scale": N(1, 3)}, "magnitudes"),
        ("ia3 in", {"on_input": torch.tensor(2)}, "neither 0 nor 1"),
        ("ia3 out", {"on_input": torch.tensor(torch.nan)}, "neither 0 nor 1"),
    ],
)
def test_lycoris(tmp_path: Path, kind: str, container: str, more: Roles, match: str) -> None:
    layer = KINDS[kind][0]
    modules = {base_of(layer, FP32).path: {**roles_of(kind, FP32), **more}}
    refuse(tmp_path, layer, write_lycoris(tmp_path / "a.safetensors", modules, container), match)


@pytest.mark.parametrize(("container", "end"), [("kohya", "_bias"), ("bare", ".bias")])
def test_two_changes_of_one_bias(tmp_path: Path, container: str, end: str) -> None:
    path = base_of("linear", FP32).path
    modules = {path: roles_of("full", FP32), path + end: {"diff": N(25)}}
    file = write_lycoris(tmp_path / "a.safetensors", modules, container)
    refuse(tmp_path, "linear", file, "two updates")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (kind, role)
        for kind in ("tokens", "embedding")
        for role in ("hada_w1_a", "lokr_w1", "ia3_l", "lora_E", "vera_lambda_b")
    ]
    + [(kind, "lora_magnitude_vector") for kind in ("tokens", "loha", "lokr full", "adalora", "vera")],
)
def test_two_methods_of_peft_on_one_module(tmp_path: Path, kind: str, more: str) -> None:
    adapter = peft(kind)
    mixed = replace(adapter, roles={**adapter.roles, more: N(25)})
    refuse(tmp_path, adapter.layer, mixed.write(tmp_path / "a"), "two kinds")


@pytest.mark.parametrize("kind", ["lora", "tokens"])
def test_projections_without_vera(tmp_path: Path, kind: str) -> None:
    adapter = replace(peft(kind), shared={"vera_A": N(3, 6)})
    refuse(tmp_path, "linear", adapter.write(tmp_path / "a"), "does not have")


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        ("loha", {"r": 4}, "rank 4"),
        ("loha", {"rank_pattern": {"linear": 9}}, "rank 9"),
        ("lokr w2", {"r": 3}, "rank 3"),
        ("lokr full", {"r": None}, "does not say the rank"),
        ("lokr full", {"r": 0}, "does not say the rank"),
        ("vera", {"r": 4}, "rank 4"),
        ("adalora", {"init_r": 3}, "more ranks"),
        ("miss", {"r": 5}, "rank 5"),
        ("miss", {"init_weights": "bat"}, "says init_weights 'bat', but its tensor is not"),
        ("miss bat", {"init_weights": True}, "says init_weights True, but its tensor is of the variant bat"),
        ("miss bat", {"r": 4}, "rank 4"),
        ("hra", {"r": 3}, "rank 3"),
        ("deft", {"r": 3}, "rank 3"),
        ("deft", {"decomposition_method": "svd"}, "projects by 'svd', which peft does not have"),
        ("peanut", {"r": 4}, "rank 4"),
        ("peanut", {"act_fn": "gelu"}, "only relu is supported"),
        ("peanut", {"scaling": "much"}, "says scaling 'much'"),
        ("hira", {"r": 4}, "rank 4"),
        ("road", {"group_size": 5}, "in groups of 5"),
        ("road", {"variant": "road_3"}, "variant 'road_3'"),
        ("miss mini", {"mini_r": 4}, "says mini_r 4, but its block is for 3"),
        ("bone", {"r": 4}, "rank 4"),
        ("pvera", {"r": 6}, "rank 6"),
        ("supertuning", {"r": 3}, "rank 3, but it has no factors"),
        ("supertuning lora", {"r": 4}, "rank 4"),
        ("randlora", {"r": 6}, "rank 6"),
        ("gralora", {"r": 8}, "rank 8"),
        ("gralora", {"hybrid_r": 1}, "hybrid_r 1, but its tensors have 0"),
        ("fourierft", {"n_frequency": 21}, "says n_frequency 21, but it has 20 numbers"),
        ("fourierft", {"scaling": None}, "only the config tells its scaling"),
        ("fourierft", {"scaling": "150"}, "scaling is '150', not a finite number"),
        ("fourierft", {"scaling": True}, "scaling is True, not a finite number"),
        ("fourierft", {"scaling": torch.inf}, "not a finite number"),
        ("fourierft", {"scaling": torch.nan}, "not a finite number"),
        ("fourierft", {"scaling": 10**400}, "not a finite number"),
        ("fourierft", {"random_loc_seed": None}, "only the config tells its random_loc_seed"),
        ("fourierft", {"random_loc_seed": 777.0}, "random_loc_seed is 777.0, not one of torch's"),
        ("waveft", {"random_loc_seed": 2**64}, "not one of torch's"),
        ("waveft", {"random_loc_seed": -(2**63) - 1}, "not one of torch's"),
        ("waveft", {"use_idwt": None}, "only the config tells its use_idwt"),
        ("waveft", {"use_idwt": 1}, "use_idwt is 1, not true or false"),
        ("waveft", {"wavelet_family": None}, "only the config tells its wavelet_family"),
        ("waveft", {"wavelet_family": "coif5"}, "wavelet_family is 'coif5', and known are db1"),
        ("waveft", {"wavelet_family": ["db1"]}, "and known are db1"),
    ],
)
def test_ranks_of_another_adapter(tmp_path: Path, kind: str, fields: Mapping[str, Any], match: str) -> None:
    adapter = peft(kind)
    other = replace(adapter, config={**adapter.config, **fields})
    refuse(tmp_path, adapter.layer, other.write(tmp_path / "a"), match)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_fits_both_ways(tmp_path: Path, transposed: bool) -> None:
    """RandLoRA has the sides of a weight, and not which is which: a bias tells, and without one nothing does."""
    adapter, base = peft("randlora"), base_of("linear", FP32)
    fields = {key: x for key, x in adapter.config.items() if key != "fan_in_fan_out"}
    folder = replace(adapter, config=fields).write(tmp_path / "a")
    stored = {f"{base.path}.weight": base.weight.T.contiguous() if transposed else base.weight}
    save_file({**stored, f"{base.path}.bias": base.bias}, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", folder, tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")[f"{base.path}.weight"]
    wanted = merged_codes(base, peft_updates(adapter, (25, 6)))[f"{base.path}.weight"]
    assert count_wrong(found.T if transposed else found, wanted) == 0
    save_file(stored, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="fits both ways, and nothing tells"):
        loratool.merge(tmp_path / "bare.safetensors", folder, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("kind", "roles", "match"),
    [
        ("miss", {"miss_block": N(3, 11)}, "but the base weight is"),
        ("miss mini", {"miss_block": N(4, 5)}, "but the base weight is"),
        ("miss", {"miss_block": N(3, 0)}, "not a block of r by the outputs"),
        ("miss", {"miss_block": N(3)}, "not a block of r by the outputs"),
        ("miss", {"miss_block": torch.full((3, 12), torch.inf)}, "nan or inf"),
        ("gralora", {"gralora_A": N(2, 3, 6)}, "not the blocks of a product"),
        ("gralora", {"gralora_B": N(4, 4, 6)}, "not the blocks of a product"),
        ("gralora", {"gralora_A": N(2, 5, 4)}, "but the base weight is"),
        ("gralora", {"gralora_A_general.weight": N(2, 6)}, "one of the general factors"),
        ("gralora hybrid", {"gralora_A_general.weight": N(2, 8)}, "of another size"),
        ("c3a", {"c3a_kernel": N(2, 3, 4)}, "but the base weight is"),
        ("c3a", {"c3a_kernel": N(3, 4)}, "not a table of circulant blocks"),
        ("pvera", {"pvera_lambda_d": N(3)}, "not a mean and a variance"),
        ("pvera", {"pvera_lambda_b": N(24)}, "but the base weight is"),
        ("randlora", {"randlora_lambda": N(4, 3)}, "cannot be multiplied"),
        ("randlora", {"randlora_gamma": N(2, 5)}, "but the base weight is"),
        ("randlora wide", {"randlora_A": N(4, 2, 6)}, "cannot be multiplied"),
        ("randlora wide", {"randlora_B": N(7, 3, 4)}, "but the base weight is"),
        ("shira", {"shira_weight": N(60)}, "not two for each"),
        ("shira", {"shira_indices": torch.full((2, 62), 6)}, r"names the element \(6, 6\) of a weight of \(25, 6\)"),
        ("shira", {"shira_indices": torch.full((2, 62), -1)}, "negative numbers or fractions"),
        ("shira", {"shira_indices": torch.full((2, 62), 0.5)}, "negative numbers or fractions"),
        ("shira", {"shira_indices": torch.zeros((2, 62), dtype=torch.float16)}, "has dtype F16, not one of whole"),
        ("shira", {"shira_weight": torch.full((62,), torch.nan)}, "nan or inf"),
        ("supertuning", {"supertuning_values": N(41)}, r"\(41,\) numbers at \(40,\) places"),
        ("supertuning", {"supertuning_indices": torch.full((40,), 150)}, "names the element 150 of a weight"),
        ("supertuning", {"supertuning_lora_A.weight": N(3, 6)}, "one of the factors"),
        ("supertuning lora", {"supertuning_lora_A.weight": N(2, 6)}, "do not share a rank"),
        ("miss bat", {"miss_block": N(4, 3, 4)}, "not square blocks"),
        ("miss bat", {"miss_block": N(3, 3, 3)}, "but the base weight is"),
        ("bone", {"bone_block": N(3, 4, 4)}, "rank 3, but its tensors have rank 4"),
        ("oft 0.13", {"oft_r": N(3, 7, 7)}, "but the base weight is"),
        ("oft 0.13", {"oft_r": N(4, 7, 6)}, "not square blocks"),
        ("oft 0.15", {"oft_s": N(24, 1)}, "but the base weight is"),
        ("boft", {"boft_R": N(1, 2, 2, 2)}, "but the base weight is"),
        ("boft factors", {"boft_R": N(3, 2, 4, 4)}, "do not make butterflies"),
        ("boft", {"boft_s": N(25)}, "not a scale for each output"),
        ("road", {"road_theta": N(5)}, "not as many of both"),
        ("road", {"road_theta": N(5), "road_alpha": N(5)}, "do not make groups of 4"),
        ("road 2", {"road_theta": N(8), "road_alpha": N(8)}, "but the base weight is"),
        ("hra", {"hra_u": N(7, 2)}, "but the base weight is"),
        ("hra", {"hra_u": N(6)}, "not the inputs by the rank"),
        ("hra", {"hra_u": torch.zeros(6, 2)}, "a vector of its U is 0"),
        ("hira", {"hira_A": N(2, 6)}, "cannot be multiplied"),
        ("hira", {"hira_B": N(24, 3)}, "but the base weight is"),
        ("glora", {"glora_A.Xd": N(25, 2)}, "cannot be multiplied"),
        ("glora", {"glora_D.X": N(3, 3)}, "neither a column nor one number"),
        ("glora", {"glora_C.Xd": N(6, 3), "glora_C.Xu": N(3, 2)}, "not a column"),
        ("glora", {"glora_C.Xd": N(6, 3)}, "path C of"),
        ("glora", {"glora_C.zeros": N(6, 1)}, "is not 0"),
        ("glora vector", {"glora_A.X": N(24, 1)}, "of several sizes"),
        ("deft", {"deft_R": N(3, 6)}, "cannot be multiplied"),
        ("deft", {"deft_P": N(24, 2)}, "but the base weight is"),
        ("deft para", {"deft_R": N(2, 6)}, "its R contradicts para"),
        ("peanut", {"peanut_B.weight": N(25, 2)}, "make no network"),
        ("peanut deep", {"peanut_encoders.0.weight": N(3, 2)}, "make no network"),
        ("peanut", {"peanut_decoders.0.weight": N(3, 3)}, "make no network"),
        ("glora vector", {"glora_A.X": N(24, 1), "glora_B.X": N(24, 1)}, "but the base weight is"),
        ("glora vector", {"glora_C.X": N(5, 1)}, "path C of"),
        ("fourierft", {"fourierft_spectrum": N(20, 1)}, "not a list of numbers"),
        ("fourierft", {"fourierft_spectrum": N(0)}, "not a list of numbers"),
        ("fourierft", {"fourierft_spectrum": N(151)}, "but the base weight is"),
        ("fourierft", {"fourierft_spectrum": torch.full((20,), torch.nan)}, "nan or inf"),
        ("fourierft", {"fourierft_spectrum": torch.full((20,), 1e-40, dtype=torch.float64)}, "beyond 2"),
        ("waveft", {"waveft_spectrum": N(151)}, "but the base weight is"),
        ("waveft", {"waveft_spectrum": torch.full((30,), torch.inf)}, "nan or inf"),
        ("waveft", {"waveft_spectrum": torch.full((30,), 1e40, dtype=torch.float64)}, "beyond 2"),
    ],
)
def test_tensors_of_another_size(tmp_path: Path, kind: str, roles: Roles, match: str) -> None:
    adapter = peft(kind)
    fields = {"mini_r": 5} if kind == "miss mini" else {"n_frequency": None}
    other = replace(adapter, roles={**adapter.roles, **roles}, config={**adapter.config, **fields})
    refuse(tmp_path, adapter.layer, other.write(tmp_path / "a"), match)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("lokr full", "rank"),
        ("ia3 conv", "only the config"),
        ("adalora", "init_r"),
        ("fourierft", "only the config tells its scaling"),
        ("waveft", "only the config tells its scaling"),
    ],
)
def test_what_only_a_config_says(tmp_path: Path, kind: str, match: str) -> None:
    """No value of --alpha would make it mergeable, so that none is asked for."""
    adapter = peft(kind)
    folder = adapter.write(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    refuse(tmp_path, adapter.layer, folder, match)


@pytest.mark.parametrize("shape", [(), (0, 6), None])
def test_a_bias_without_factors(tmp_path: Path, shape: tuple[int, ...] | None) -> None:
    """Its scale is theirs."""
    roles = {"lora_B.bias": N(25), **({} if shape is None else {"lora_A.weight": torch.zeros(shape)})}
    refuse(tmp_path, "linear", replace(BIAS, roles=roles).write(tmp_path / "a"), "A factor")


@pytest.mark.parametrize("kind", ["loha", "lokr full"])
def test_rslora_is_a_field_of_lora(tmp_path: Path, kind: str) -> None:
    adapter, base = peft(kind), base_of("linear", FP32).write(tmp_path / "base.safetensors")
    for name, fields in (("plain", {}), ("rslora", {"use_rslora": True})):
        folder = replace(adapter, config={**adapter.config, **fields}).write(tmp_path / name)
        loratool.merge(base, folder, tmp_path / f"{name}.safetensors")
    plain, other = (
        load_file(tmp_path / f"{name}.safetensors")["blocks.0.linear.weight"] for name in ("plain", "rslora")
    )
    assert torch.equal(plain, other)


def test_a_weight_under_ia3(tmp_path: Path) -> None:
    """It takes the base's place, and the vector multiplies it."""
    adapter, value = peft("ia3"), N(25, 6)
    folder = replace(adapter, roles={**adapter.roles, "base_layer.weight": value}).write(tmp_path / "a")
    model, out = base_of("linear", FP32).write(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    loratool.merge(model, folder, out)
    assert torch.equal(load_file(out)["blocks.0.linear.weight"], value * adapter.roles["ia3_l"])
    loratool.unmerge(out, folder, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


def test_adalora_that_pruned_a_module_away(tmp_path: Path) -> None:
    """PEFT saves it with factors of rank 0."""
    whole = peft("adalora")
    empty = {"lora_A": torch.zeros(0, 6), "lora_E": torch.zeros(0, 1), "lora_B": torch.zeros(25, 0)}
    folder = replace(whole, roles=empty).write(tmp_path / "a")
    model, out = base_of("linear", FP32).write(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    loratool.merge(model, folder, out)
    assert all(torch.equal(x, load_file(model)[name]) for name, x in load_file(out).items())
    assert loratool.inspect(folder).kind == "adapter"
    with pytest.raises(LoratoolError, match="linear"):
        loratool.convert(folder, tmp_path / "lora", to="peft")


@pytest.mark.slow
def test_every_tensor_counts(tmp_path: Path) -> None:
    """Without any one of them a merge differs or is refused; only LoKr of two whole matrices needs no alpha, and a
    rotation none of 0.
    """
    without_alpha = ("lokr full", "lokr conv full", "lokr conv1d full", "diag-oft", "diag-oft conv", "boft")
    for kind, (layer, _) in KINDS.items():
        base, roles, merged = base_of(layer, FP32), roles_of(kind, FP32), []
        model = base.write(tmp_path / "base.safetensors")
        for without in (None, *roles):
            rest = {role: x for role, x in roles.items() if role != without}
            file = write_lycoris(tmp_path / "a.safetensors", {base.path: rest}, "bare")
            if without == "alpha" and kind in without_alpha:
                continue
            try:
                loratool.merge(model, file, tmp_path / "out.safetensors", undo=False, force=True)
            except LoratoolError:
                continue
            merged.append((without, load_file(tmp_path / "out.safetensors")))
        (_, whole), *others = merged
        assert [w for w, each in others if all(torch.equal(x, whole[name]) for name, x in each.items())] == [], kind


def test_none_is_refused_as_it_is(tmp_path: Path) -> None:
    """The makers above give files that merge."""
    for kind in ("lora", "tokens", "bias", "loha", "lokr full", "vera", "adalora", "ia3 conv"):
        adapter = peft(kind)
        model = base_of(adapter.layer, FP32).write(tmp_path / "base.safetensors")
        loratool.merge(model, adapter.write(tmp_path / "a"), tmp_path / "out.safetensors", undo=False, force=True)


@pytest.mark.parametrize("kernel", [(1,), (2,), (3, 2)])
def test_factors_of_lokr_whose_core_has_rank_one(kernel: tuple[int, ...]) -> None:
    """Sides of 1, whose strides are those of another view."""
    core, a, b, w1 = N(1, 1, *kernel), N(1, 2), N(1, 3), N(2, 3)
    w1_, a_, b_, core_ = map(numbers_of, (w1, a, b, core))
    B, A = map(torch.from_numpy, stack_factors(LoKr(w1_, None, None, None, a_, b_, core_, 0.5)))
    w2 = torch.einsum("jk,p,q->pqk", core.flatten(2)[0].double(), a[0].double(), b[0].double()).flatten(1)
    assert torch.allclose(B[0] @ A[0], 0.5 * torch.kron(w1.double(), w2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", [1, 2])
def test_a_side_of_lokr_whose_factors_have_more_ranks_than_it(tmp_path: Path, side: int) -> None:
    """LyCORIS factors a side by its longer axis, so that a (2, 512) can have factors of rank 64."""
    roles = {"lokr_w1": N(5, 2), "lokr_w2": N(5, 3)}
    rows, columns = roles.pop(f"lokr_w{side}").shape
    roles |= {f"lokr_w{side}_a": N(rows, 9), f"lokr_w{side}_b": N(9, columns)}
    model = base_of("linear", FP32).write(tmp_path / "base.safetensors")
    folder = Peft("linear", roles, {"peft_type": "LOKR", "r": 9, "alpha": 4}).write(tmp_path / "a")
    loratool.convert(folder, tmp_path / "lora", to="peft")
    loratool.resize(folder, tmp_path / "resized", rank=10)
    made = []
    for adapter in (folder, tmp_path / "lora", tmp_path / "resized"):
        loratool.merge(model, adapter, tmp_path / "out.safetensors", undo=False, force=True)
        made.append(load_file(tmp_path / "out.safetensors")["blocks.0.linear.weight"])
    assert all(torch.allclose(made[0], other, rtol=1e-5, atol=1e-5) for other in made[1:])


@pytest.mark.parametrize("kind", ["loha", "loha tucker", "lokr tucker", "lora_mid"])
def test_inspect_of_a_change_beyond_float64(tmp_path: Path, kind: str) -> None:
    """The products on the way to its singular values are inf."""
    roles = roles_of(kind, torch.float64)
    for role in roles:
        roles[role].view(-1)[0] = 1e300
    file = write_lycoris(tmp_path / "a.safetensors", {"blocks.0.layer": roles})
    (found,) = loratool.inspect(file).details
    assert found.norm == sys.float_info.max and found.effective_rank is None
    with pytest.raises(InputError, match="too large"):
        loratool.diff(file, file)


@pytest.mark.parametrize("kind", ["lora", "ia3 in", "ia3 out", "dora loha", "dora lokr in"])
def test_a_weight_of_0_asks_for_the_base(tmp_path: Path, kind: str) -> None:
    """The base is that merge, whatever the kind."""
    base = base_of(KINDS[kind][0], FP32)
    model = base.write(tmp_path / "base.safetensors")
    file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles_of(kind, FP32)})
    loratool.merge(model, (file, 0.0), tmp_path / "out.safetensors", undo=False)
    found = loratool.verify(model, (file, 0.0), tmp_path / "out.safetensors")
    assert found.status == "proven" and any("zero everywhere" in line for line in found.warnings)
