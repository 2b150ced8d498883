"""Hold rotations of other programs than PEFT and LyCORIS by their definitions, and what becomes of rotated rows.

Of kohya's OFT, of OneTrainer's and of musubi-tuner's forks, whose files have no config.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import few
from lib.files.lycoris_files import SHAPES, Numbers, Roles, base_of, kohya_oft, roles_of, write_lycoris
from lib.models import coded_models
from lib.oracles.fractions_oracle import Update, codes, count_wrong, finite_reals, merge_codes
from lib.oracles.mixed_oracle import Mixed, by_columns, grid, nearest, oft_blocks, root, unit
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag
from loratool.views.inspect_adapter import AdapterInspection

BF16, FP32 = torch.bfloat16, torch.float32


def check(folder: Path, layer: str, adapter: Path, update: Update) -> None:
    base = base_of(layer, BF16)
    model, merged, back = (folder / f"{name}.safetensors" for name in ("base", "merged", "back"))
    base.write(model)
    loratool.merge(model, adapter, merged)
    name = f"{base.path}.weight"
    wanted = merge_codes(base.weight, BF16, [update])
    assert wanted is not None and wanted != codes(base.weight)
    assert count_wrong(load_file(merged)[name], wanted) == 0
    assert loratool.verify(model, adapter, merged).status == "proven"
    loratool.unmerge(merged, adapter, back)
    assert back.read_bytes() == model.read_bytes()


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("alpha", [0.03, 1e-3, 10.0])
def test_kohyas_oft(tmp_path: Path, layer: str, alpha: float) -> None:
    """Its alpha bounds the norm of all blocks."""
    roles = kohya_oft(Numbers(FP32), *SHAPES[layer])
    roles["alpha"] = torch.tensor(alpha)
    file = write_lycoris(tmp_path / "a.safetensors", {base_of(layer, BF16).path: roles}, "kohya's OFT")
    check(tmp_path, layer, file, Mixed(oft_blocks(roles, is_kohyas=True)))


def test_an_alpha_of_0_leaves_nothing_of_kohyas_oft(tmp_path: Path) -> None:
    base, roles = base_of("linear", FP32), {**kohya_oft(Numbers(FP32), 25, 6), "alpha": torch.tensor(0.0)}
    file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "kohya's OFT")
    model, out = base.write(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    loratool.merge(model, file, out)
    change = load_file(out)[f"{base.path}.weight"].double() - base.weight.double()
    assert 0 <= change.abs().max() < 1e-7


def test_kohyas_oft_needs_its_alpha(tmp_path: Path) -> None:
    roles = kohya_oft(Numbers(FP32), *SHAPES["linear"])
    base = base_of("linear", BF16)
    file = write_lycoris(tmp_path / "a.safetensors", {base.path: {"oft_blocks": roles["oft_blocks"]}}, "kohya's OFT")
    with pytest.raises(InputError, match="alpha"):
        loratool.merge(base.write(tmp_path / "base.safetensors"), file, tmp_path / "out.safetensors")


def series(block: Tensor, b: int, factor: Any = 1) -> Any:
    """Return R - I of the series of five terms."""
    Q = 0 * unit(b)
    Q[np.triu_indices(b, 1)] = [x * factor for x in finite_reals(block)]
    Q = Q - Q.T
    Q2 = Q.dot(Q)
    return nearest(2 * (Q + Q2 + Q2.dot(Q)) + Q2.dot(Q2))


@pytest.mark.parametrize("container", ["kohya", "dotted"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_onetrainers_oft(tmp_path: Path, layer: str, scaled: bool, container: str) -> None:
    """It turns the kernels of a convolution the other way round."""
    b, inputs = 3, int(np.prod(SHAPES[layer][1:]))
    numbers = Numbers(FP32)(inputs // b, b * (b - 1) // 2, size=0.2)
    roles: Roles = {"oft_R.weight": numbers}
    if scaled:
        roles["oft_R.scaled_oft"] = torch.tensor(True)
    file = write_lycoris(tmp_path / "a.safetensors", {base_of(layer, BF16).path: roles}, container)
    factor = 1 / (2 * root(unit(1)[0, 0] * (b - 1))) if scaled else 1
    R = [series(block, b, factor) for block in numbers]
    turned = R if layer == "conv" else [each.T for each in R]
    check(tmp_path, layer, file, Mixed(lambda W: by_columns(W, turned)))


def test_settings_in_tensors(tmp_path: Path) -> None:
    """Forks of musubi-tuner write COFT's bound beside the numbers, and an alpha without a meaning."""
    b, numbers = 3, Numbers(FP32)(2, 3, size=0.2)
    settings = {"oft_block_size": 3, "oft_block_share": 0, "oft_coft": 1, "coft_eps": 0.25, "scaled_oft": 0}
    roles: Roles = {"oft_R.weight": numbers, "alpha": torch.tensor(3.0)}
    roles |= {f"{name}_metadata": torch.tensor(float(value)) for name, value in settings.items()}
    file = write_lycoris(tmp_path / "a.safetensors", {base_of("linear", BF16).path: roles}, "kohya")
    R = []
    for block in numbers:
        norm = root(2 * (grid(block) ** 2).sum())
        R.append(series(block, b, min(unit(1)[0, 0], unit(1)[0, 0] / 4 / root(unit(1)[0, 0] * 2) / norm)))
    check(tmp_path, "linear", file, Mixed(lambda W: by_columns(W, [each.T for each in R])))


def peft_folder(folder: Path, tensors: Roles, **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{name}": x for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"target_modules": ["linear"], "peft_version": "0.21.2", "fan_in_fan_out": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_an_adapter_that_adds_beside_one_that_rotates(tmp_path: Path) -> None:
    """Both are of W, and W comes back."""
    base, n = base_of("linear", BF16), Numbers(FP32)
    model = base.write(tmp_path / "base.safetensors")
    numbers = n(2, 3, size=0.2)
    one = peft_folder(tmp_path / "oft", {f"{base.path}.oft_R.weight": numbers}, peft_type="OFT", oft_block_size=3)
    A, B = n(2, 6), n(25, 2, size=0.2)
    factors = {f"{base.path}.lora_A.weight": A, f"{base.path}.lora_B.weight": B}
    two = peft_folder(tmp_path / "lora", factors, peft_type="LORA", r=2, lora_alpha=2)
    loratool.merge(model, [(one, 0.5), (two, 1.0)], tmp_path / "out.safetensors")
    R = [series(block, 3).T for block in numbers]
    both = Mixed(lambda W: W + (by_columns(W, R) - W) / 2 + grid(B).dot(grid(A)))
    wanted = merge_codes(base.weight, BF16, [both])
    assert wanted and count_wrong(load_file(tmp_path / "out.safetensors")[f"{base.path}.weight"], wanted) == 0
    loratool.unmerge(tmp_path / "out.safetensors", [(one, 0.5), (two, 1.0)], tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    """It would spoil all numbers that it is mixed with."""
    base = base_of("linear", BF16)
    base.weight[3, 2] = value
    numbers = {f"{base.path}.oft_R.weight": Numbers(FP32)(2, 3)}
    adapter = peft_folder(tmp_path / "oft", numbers, peft_type="OFT", oft_block_size=3)
    with pytest.raises(InputError, match="inf or nan, but numbers mix"):
        loratool.merge(base.write(tmp_path / "base.safetensors"), adapter, tmp_path / "out.safetensors")
    assert not [*tmp_path.glob("out*")]


def test_blocks_that_were_not_trained_keep_their_bits(tmp_path: Path) -> None:
    base = base_of("linear", BF16)
    base.weight[:, 0] = -0.0
    numbers = Numbers(FP32)(2, 3)
    numbers[0] = 0.0
    names = {f"{base.path}.oft_R.weight": numbers}
    adapter = peft_folder(tmp_path / "oft", names, peft_type="OFT", oft_block_size=3)
    model, out = base.write(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    loratool.merge(model, adapter, out)
    merged = load_file(out)[f"{base.path}.weight"]
    assert codes(merged[:, :3].contiguous()) == codes(base.weight[:, :3].contiguous())
    assert not torch.equal(merged[:, 3:], base.weight[:, 3:])
    loratool.unmerge(out, adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


def test_a_rotation_that_has_no_inverse_is_undone(tmp_path: Path) -> None:
    """R of Cayley's transform next to -1, at half its weight: W is then predicted badly, and still restored."""
    base = base_of("linear", BF16)
    numbers = torch.full((2, 3), 3e6)
    names = {f"{base.path}.oft_R.weight": numbers}
    config = {"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": False}
    adapter = peft_folder(tmp_path / "oft", names, **config)
    model, out = base.write(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    for weight in (0.5, 1.0):
        loratool.merge(model, (adapter, weight), out, force=True)
        assert loratool.verify(model, (adapter, weight), out).status == "proven"
        loratool.unmerge(out, (adapter, weight), tmp_path / "back.safetensors", force=True)
        assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    ("shape", "config", "match"),
    [
        ((2, 4), {}, "not upper triangles"),
        ((3, 3), {}, "but the base weight is"),
        ((2, 0), {}, "not upper triangles"),
        ((2, 3), {"num_cayley_neumann_terms": 0}, "terms of a series"),
        ((2, 3), {"num_cayley_neumann_terms": 1e3}, "terms of a series"),
        ((2, 3), {"coft": True, "eps": -1}, "bound of coft"),
        ((2, 3), {"peft_type": "BOFT"}, "only the config tells the series"),
    ],
)
def test_what_fits_no_definition_is_refused(tmp_path: Path, shape: Any, config: Any, match: str) -> None:
    base = base_of("linear", BF16)
    names = {f"{base.path}.oft_R.weight": torch.ones(shape)}
    adapter = peft_folder(tmp_path / "oft", names, **{"peft_type": "OFT", "oft_block_size": 3, **config})
    with pytest.raises(InputError, match=match):
        loratool.merge(base.write(tmp_path / "base.safetensors"), adapter, tmp_path / "out.safetensors")


def test_pefts_oft_without_its_config_is_refused(tmp_path: Path) -> None:
    base = base_of("linear", BF16)
    names = {f"{base.path}.oft_R.weight": torch.ones(2, 3)}
    adapter = peft_folder(tmp_path / "oft", names, peft_type="OFT")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="only the config tells the series"):
        loratool.merge(base.write(tmp_path / "base.safetensors"), adapter, tmp_path / "out.safetensors")


OUT, IN, LAYERS = 44, 24, 3
# kind -> tensors of a module of (OUT, IN), and fields of the config
WAYS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "oft": ({"oft_R.weight": (3, 28)}, {"peft_type": "OFT"}),
    "oft 0.13": ({"oft_r": (4, 12, 12)}, {"peft_type": "OFT", "peft_version": None}),
    "boft": ({"boft_R": (3, 4, 6, 6), "boft_s": (OUT, 1)}, {"peft_type": "BOFT"}),
    "bat": ({"miss_block": (11, 4, 4)}, {"peft_type": "MISS", "r": 4, "init_weights": "bat"}),
    "road": ({"road_theta": (OUT,), "road_alpha": (OUT,)}, {"peft_type": "ROAD", "variant": "road_2", "group_size": 4}),
    "hra": ({"hra_u": (IN, 3)}, {"peft_type": "HRA", "r": 3}),
    "hira": ({"hira_A": (3, IN), "hira_B": (OUT, 3)}, {"peft_type": "HIRA", "r": 3}),
    "deft": ({"deft_P": (OUT, 3), "deft_R": (3, IN)}, {"peft_type": "DEFT", "r": 3}),
    "peanut": ({"peanut_A.weight": (3, OUT), "peanut_B.weight": (OUT, 3)}, {"peft_type": "PEANUT", "r": 3}),
    "glora": ({"glora_A.X": (OUT, 1), "glora_B.Xd": (OUT, 2), "glora_B.Xu": (2, IN)}, {"peft_type": "GLORA"}),
}


def write_pair(folder: Path, kind: str, seed: int = 0) -> tuple[Path, Path]:
    """Write a base folder and an adapter of all its layers."""
    base, n = folder / "base", Numbers(FP32, seed)
    shapes, config = WAYS[kind]
    paths = [f"model.layers.{i}.mlp.up_proj" for i in range(LAYERS)]
    if not base.exists():
        base.mkdir()
        weights = Numbers(BF16, 100)
        tensors = {f"{path}.weight": weights(OUT, IN, size=0.3) for path in paths}
        save_file({**tensors, "model.norm.weight": weights(IN)}, base / "model.safetensors", {"format": "pt"})
        (base / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    made = {f"{path}.{role}": n(*shape, size=0.2) for path in paths for role, shape in shapes.items()}
    for name, x in made.items():
        if name.endswith(("road_alpha", "boft_s")):
            x += 1
    return base, peft_folder(folder / f"{kind} {seed}", made, **{**config, "target_modules": ["up_proj"]})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("kind", WAYS)
def test_records_of_few_rows(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many records, threads and blocks, whose ends the blocks of an update need not divide: the same bytes."""
    base, adapter = write_pair(tmp_path, kind)
    loratool.merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("loratool.undo.checks.RECORD", 7 * IN)
    monkeypatch.setattr("loratool.commands.verify.replay.ROWS", 5)
    loratool.merge(base, adapter, tmp_path / "parts")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert loratool.verify(base, adapter, tmp_path / "parts").status == "proven"
    loratool.unmerge(tmp_path / "parts", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_into_another_type(tmp_path: Path, kind: str, dtype: Any) -> None:
    base, adapter = write_pair(tmp_path, kind)
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype, undo=False)
    assert loratool.verify(base, adapter, tmp_path / "out").status == "proven"


@pytest.mark.parametrize("kind", WAYS)
def test_in_place_and_in_memory(tmp_path: Path, kind: str) -> None:
    base, one = write_pair(tmp_path, kind)
    _, two = write_pair(tmp_path, kind, seed=1)
    wanted = {}
    for number, adapter in enumerate((one, two)):
        loratool.merge(base, adapter, tmp_path / f"merged{number}")
        wanted[adapter] = load_file(tmp_path / f"merged{number}" / "model.safetensors")
    before = files_of(base)

    tensors = load((base / "model.safetensors").read_bytes())
    live = loratool.live.merge(tensors, one)
    assert all(torch.equal(tensors[name], x) for name, x in wanted[one].items())
    live.swap(two)
    assert all(torch.equal(tensors[name], x) for name, x in wanted[two].items())
    live.unmerge()
    assert all(torch.equal(tensors[name], x) for name, x in load((base / "model.safetensors").read_bytes()).items())

    for by in ("window", "shard"):
        loratool.merge(base, one, in_place=True, by=by)
        assert all(
            torch.equal(load((base / "model.safetensors").read_bytes())[name], x) for name, x in wanted[one].items()
        )
        loratool.merge(base, two, replace=one, in_place=True, by=by)
        assert all(
            torch.equal(load((base / "model.safetensors").read_bytes())[name], x) for name, x in wanted[two].items()
        )
        loratool.unmerge(base, two, in_place=True, by=by)
        assert files_of(base) == before


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize(
    "vector", few(["bnb_nf4_nested", "gptq_v1_4bit_act_order", "fp8_blocks", "mlx_affine5_64"], "bnb_nf4_nested")
)
def test_coded_bases(tmp_path: Path, kind: str, vector: str) -> None:
    """W is the nearest code to what is predicted, and the undo file has the difference."""
    base = coded_models.write_base(vector, tmp_path / "coded")
    numbers = coded_models.sized(coded_models.numbers_of(base))
    n, made = Numbers(FP32), {}
    shapes, config = WAYS[kind]
    for name, W in numbers.items():
        out, inp = W.shape
        sizes = {OUT: out, IN: inp}
        for role, shape in shapes.items():
            made[f"{name.removesuffix('.weight')}.{role}"] = n(*of_size(kind, role, shape, sizes), size=0.1)
    config = {**config, "target_modules": "all-linear", **({"r": 2} if kind == "bat" else {"group_size": 2})}
    adapter = peft_folder(tmp_path / "adapter", made, **config)
    for quantized in ("dequantize", "requantize"):
        loratool.merge(base, adapter, tmp_path / quantized, quantized=quantized, allow="lossy")
        loratool.unmerge(tmp_path / quantized, adapter, tmp_path / f"{quantized} back")
        assert coded_models.files_of(tmp_path / f"{quantized} back") == coded_models.files_of(base)


def of_size(kind: str, role: str, shape: tuple[int, ...], sizes: dict[int, int]) -> tuple[int, ...]:
    """Return the shape for a layer of other sizes, in blocks of 2."""
    out, inp = sizes[OUT], sizes[IN]
    special = {"oft": (inp // 2, 1), "oft 0.13": (out // 2, 2, 2), "bat": (out // 2, 2, 2)}
    if role == "boft_R":
        return (1, inp // 2, 2, 2)
    return special.get(kind) or tuple(sizes.get(side, side) for side in shape)


@pytest.mark.parametrize(("kind", "remedy"), [("oft", "one after the other"), ("hira", "peft sums their changes")])
def test_two_that_do_not_add_up(tmp_path: Path, kind: str, remedy: str) -> None:
    """PEFT merges rotations in turn; of HiRA and GLoRA it sums the changes of the base."""
    base, one = write_pair(tmp_path, kind)
    _, two = write_pair(tmp_path, kind, seed=1)
    with pytest.raises(InputError, match="do not add up") as refused:
        loratool.merge(base, [one, two], tmp_path / "out")
    assert remedy in str(refused.value.remedy)


@pytest.mark.parametrize("kind", WAYS)
def test_the_best_lora_of_a_rank_with_the_base(tmp_path: Path, kind: str) -> None:
    """The error is that of the merged models; HRA's change has the rank of its vectors."""
    base, adapter = write_pair(tmp_path, kind)
    if kind != "oft":  # which stays OFT
        with pytest.raises(NeedsFlag) as flagged:
            loratool.convert(adapter, tmp_path / "no", to="peft")
        assert ("--rank R" in str(flagged.value.remedy)) == (kind not in ("hra", "deft", "peanut"))
    for rank in (4, 24, None)[: 3 if kind == "hra" else 2]:
        made = loratool.convert(adapter, tmp_path / f"lora {rank}", to="peft", plain=True, base=base, rank=rank)
        found = []
        for number, each in enumerate((adapter, tmp_path / f"lora {rank}")):
            out = tmp_path / f"{rank} {number}"
            loratool.merge(base, each, out, dtype="fp32", undo=False)
            found.append(load_file(out / "model.safetensors"))
        before = load((base / "model.safetensors").read_bytes())
        for row in made.modules:
            name = f"{row.name}.weight"
            W, X, Y = (x[name].double() for x in (before, *found))
            assert math.isclose(float((Y - X).norm() / (X - W).norm()), row.error, rel_tol=1e-4, abs_tol=1e-6)
            S = torch.linalg.svdvals(X - W)
            assert math.isclose(float(S[row.rank :].norm() / S.norm()), row.error, rel_tol=1e-3, abs_tol=1e-6)


def test_a_turned_bias_is_no_lora(tmp_path: Path) -> None:
    base = base_of("even", BF16)
    names = {f"{base.path}.{role}": torch.ones(12) for role in ("road_theta", "road_alpha")}
    config = {"peft_type": "ROAD", "variant": "road_2", "group_size": 4, "target_modules": ["even"]}
    adapter = peft_folder(tmp_path / "road", names, **config)
    model = base.write(tmp_path / "base.safetensors")
    with pytest.raises(InputError, match="is a bias, whose change no LoRA holds"):
        loratool.convert(adapter, tmp_path / "out", to="peft", plain=True, base=model, rank=4)


# fault -> the kind, and what another program makes of it
MISTAKES: dict[str, tuple[str, Any]] = {
    "the rotations are turned the other way": ("diag-oft", lambda f, roles: turned(roles)),
    "the scales of the outputs are ignored": ("diag-oft", lambda f, roles: oft_blocks({**roles, "rescale": None})),
    "the bound on the rotations is ignored": (
        "diag-oft bound",
        lambda f, roles: oft_blocks({**roles, "alpha": torch.tensor(0.0)}),
    ),
    "the rotations are bound by alpha, not by alpha times the outputs": (
        "diag-oft bound",
        lambda f, roles: oft_blocks({**roles, "alpha": roles["alpha"] / 25}),
    ),
    "the weight of the adapter is applied twice": (
        "diag-oft",
        lambda f, roles: lambda W: W + (f(W) - W) * Fraction(0.7),
    ),
}


def turned(roles: Roles) -> Any:
    """Return the rotations as R where R.T is meant: those of -Q."""
    return oft_blocks({**roles, "oft_blocks": -roles["oft_blocks"]})


@pytest.mark.parametrize("fault", MISTAKES)
def test_verify_names_what_other_programs_make_of_it(tmp_path: Path, fault: str) -> None:
    kind, mistake = MISTAKES[fault]
    base, roles = base_of("linear", FP32), roles_of(kind, FP32)
    file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "kohya")
    wrong = Mixed(mistake(oft_blocks(roles), roles), 0.7)
    codes_of_wrong = merge_codes(base.weight, FP32, [wrong])
    weight = torch.tensor(codes_of_wrong, dtype=torch.int64).to(torch.uint32).view(torch.float32).reshape(25, 6)
    save_file({f"{base.path}.weight": weight, f"{base.path}.bias": base.bias}, tmp_path / "merged.safetensors")
    model = base.write(tmp_path / "base.safetensors")
    report = loratool.verify(model, (file, 0.7), tmp_path / "merged.safetensors")
    (row,) = (each for each in report.tensors if each.verdict == "wrong")
    assert row.detail == fault


def test_an_old_file_of_glora(tmp_path: Path) -> None:
    """Its sides have each other's names; of square ones nothing tells which they are."""
    base, roles = base_of("linear", FP32), roles_of("glora", FP32)
    names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {f"{names[role[:2]]}.weight" if role[:2] in names else role: x for role, x in roles.items()}
    model, merged = base.write(tmp_path / "base.safetensors"), []
    for number, each in enumerate((roles, old)):
        file = write_lycoris(tmp_path / f"{number}.safetensors", {base.path: each}, "kohya")
        loratool.merge(model, file, tmp_path / f"merged{number}.safetensors", undo=False)
        merged.append(load_file(tmp_path / f"merged{number}.safetensors")[f"{base.path}.weight"])
    assert torch.equal(*merged) and not torch.equal(merged[0], base.weight)
    square = {f"{role}.weight": torch.ones(6, 6) for role in names}
    file = write_lycoris(tmp_path / "square.safetensors", {base.path: square}, "kohya")
    with pytest.raises(InputError, match="an old file of GLoRA or a new one"):
        loratool.merge(model, file, tmp_path / "out.safetensors")


def notes_of(adapter: Path) -> str:
    report = loratool.inspect(adapter)
    assert isinstance(report, AdapterInspection) and not report.problems
    return "\n".join(report.notes)


@pytest.mark.parametrize("cayley", [False, True])
def test_inspect_says_how_far_a_series_is_from_a_rotation(tmp_path: Path, cayley: bool) -> None:
    base, numbers = base_of("linear", FP32), Numbers(FP32)(2, 3, size=0.2)
    names = {f"{base.path}.oft_R.weight": numbers}
    config = {"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": not cayley}
    said = notes_of(peft_folder(tmp_path / "oft", names, **config))
    if cayley:
        assert not said
        return
    worst = 0.0
    for block in numbers:
        R = torch.tensor(np.array(series(block, 3) + unit(3), dtype=np.float64))
        worst = max(worst, float((R.T @ R - torch.eye(3)).norm()))
    assert f"||R.T R - 1|| is up to {worst:.2g}, in {base.path}" in said


@pytest.mark.parametrize(("alpha", "active"), [(0.01, True), (10.0, False)])
def test_inspect_says_where_a_bound_is_active(tmp_path: Path, alpha: float, active: bool) -> None:
    base, roles = base_of("linear", FP32), {**roles_of("diag-oft", FP32), "alpha": torch.tensor(alpha)}
    said = notes_of(write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "kohya"))
    assert ("makes them smaller in 1 of 1 modules" in said) == active


@pytest.mark.parametrize("kind", ["oft", "hira"])
def test_an_embedding_becomes_a_lora_that_peft_applies(tmp_path: Path, kind: str) -> None:
    n, path = Numbers(FP32), "model.embed_tokens"
    base, tensors = tmp_path / "base.safetensors", {f"{path}.weight": n(20, 8, size=0.3)}
    save_file(tensors, base)
    made = {
        "oft": {f"{path}.oft_embedding_R.weight": n(2, 6, size=0.2)},
        "hira": {f"{path}.hira_embedding_A": n(3, 20), f"{path}.hira_embedding_B": n(8, 3)},
    }[kind]
    config = {"peft_type": kind.upper(), "target_modules": ["embed_tokens"], "oft_block_size": 4}
    adapter = peft_folder(tmp_path / "adapter", made, **config)
    loratool.convert(adapter, tmp_path / "lora", to="peft", plain=True, base=base, rank=8)
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(20, 8)})})
    model.load_state_dict(tensors)
    peft = pytest.importorskip("peft")
    wanted = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()[f"{path}.weight"]
    loratool.merge(base, adapter, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")[f"{path}.weight"]
    change = (found - tensors[f"{path}.weight"]).norm()
    assert change > 0.1 and (found - wanted).norm() < 1e-5 * change
