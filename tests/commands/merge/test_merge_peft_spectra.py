"""Hold FourierFT and WaveFT, whose numbers have places that a seed draws, against peft's own merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.errors import InputError
from loratool.numerics.wavelet_filters import FILTERS

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore")]

FOURIER, WAVE = "FourierFTConfig", "WaveFTConfig"
# variant -> the class of peft's config and its arguments
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fourierft": (FOURIER, {"n_frequency": 100}),
    "fourierft, every frequency": (FOURIER, {"n_frequency": 5 * 7, "random_loc_seed": 3}),
    "fourierft, patterns": (FOURIER, {"n_frequency": 9, "n_frequency_pattern": {"wide": 70}, "scaling": 2}),
    "fourierft, biases": (FOURIER, {"n_frequency": 20, "bias": "all", "random_loc_seed": -1}),
    "waveft": (WAVE, {"n_frequency": 90}),
    "waveft, every place": (WAVE, {"n_frequency": 5 * 7, "wavelet_family": "db3", "scaling": -1.5}),
    "waveft, places": (WAVE, {"n_frequency": 35, "use_idwt": False, "random_loc_seed": 2**40 + 1}),
    "waveft, patterns": (WAVE, {"n_frequency": 9, "n_frequency_pattern": {"wide": 70}, "wavelet_family": "sym6"}),
    "waveft, shares": (WAVE, {"n_frequency": 40, "proportional_parameters": True, "wavelet_family": "coif1"}),
    **{f"waveft, {name}": (WAVE, {"n_frequency": 30, "wavelet_family": name}) for name in FILTERS},
}


class Net(nn.Module):
    """Layers with sides that are even, odd, prime, and shorter than the longest filters."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.square, self.odd = nn.Linear(32, 48), nn.Linear(18, 18), nn.Linear(7, 5)


def write(folder: Path, variant: str, dtype: torch.dtype = torch.float64, **fields: Any) -> dict[str, torch.Tensor]:
    """Write a base and an adapter of it, both in a type; return what peft merges."""
    torch.manual_seed(3)
    model = Net().to(dtype)
    save_file(model.state_dict(), folder / "base.safetensors")
    name, arguments = VARIANTS[variant]
    targets = ["wide", "square", "odd"]
    if arguments["n_frequency"] > 35:
        targets.remove("odd")
    config = getattr(peft, name)(target_modules=targets, **{**arguments, **fields})
    live = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    live.save_pretrained(folder / "adapter")
    merged: dict[str, torch.Tensor] = live.merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("variant", few(list(VARIANTS), "fourierft", "fourierft, patterns", "waveft", "waveft, shares"))
def test_merged_as_peft_has_it(tmp_path: Path, variant: str) -> None:
    """Then undone byte for byte, and proven. peft computes FourierFT in float32."""
    wanted = write(tmp_path, variant)
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors"
    before = load_file(base)
    loratool.merge(base, adapter, out)
    found, tolerance = load_file(out), 2e-6 if variant.startswith("fourierft") else 1e-12
    for name in wanted:
        change = (wanted[name] - before[name]).abs().max()
        assert (found[name] - wanted[name]).abs().max() <= tolerance * change, name
    assert sum(not torch.equal(wanted[name], before[name]) for name in wanted) >= 2
    assert loratool.verify(base, adapter, out).status == "proven"
    loratool.unmerge(out, adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["fourierft", "waveft", "waveft, places", "waveft, coif3"])
def test_merges_of_peft_are_recognized(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    """Each sum is off by float32's rounding errors, or by its own type's, and by no more."""
    if dtype == torch.bfloat16 and variant in ("waveft", "waveft, coif3"):
        pytest.skip("peft rounds the filters to the type of such an adapter")
    merged = write(tmp_path, variant, dtype)
    save_file({name: x.contiguous() for name, x in merged.items()}, tmp_path / "merged.safetensors")
    report = loratool.verify(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    assert report.status == "proven"
    altered = {**merged, "wide.weight": merged["wide.weight"] * (1 + 2.0**-6)}
    save_file({name: x.contiguous() for name, x in altered.items()}, tmp_path / "altered.safetensors")
    report = loratool.verify(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "altered.safetensors")
    assert report.status == "wrong"


@pytest.mark.parametrize("variant", ["fourierft", "waveft"])
def test_a_weight_whose_places_depend_on_the_version_of_torch(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if those of `wide` were too many."""
    write(tmp_path, variant)
    monkeypatch.setattr("loratool.numerics.torch_random.LARGEST", 32 * 48 - 1)
    with pytest.raises(InputError, match=r"a weight of \(48, 32\): versions of torch draw(.|\n)*peft in the torch"):
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    assert not [*tmp_path.glob("out*")]


def single_file(folder: Path, module: str) -> tuple[dict[str, torch.Tensor], Path, Path]:
    """Write a few weights of a single file of Flux, and an adapter of a module of diffusers' class."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (18, 6),
        "single_blocks.0.linear1.weight": (42, 6),
        "final_layer.adaLN_modulation.1.weight": (12, 6),
    }
    weights = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    adapter, base = folder / "adapter", folder / "base.safetensors"
    save_file(weights, base)
    adapter.mkdir()
    spectrum = {f"base_model.model.{module}.fourierft_spectrum": torch.randn(9, generator=g)}
    save_file(spectrum, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "FOURIERFT", "scaling": 5.0, "random_loc_seed": 7, "target_modules": [module]}
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "fan_in_fan_out": False}))
    return weights, base, adapter


def test_rows_of_a_fused_weight(tmp_path: Path) -> None:
    """They are changed as the weight of the module alone is."""
    module = "transformer_blocks.0.attn.to_k"
    weights, base, adapter = single_file(tmp_path, module)
    loratool.merge(base, adapter, tmp_path / "out.safetensors")
    qkv = "double_blocks.0.img_attn.qkv.weight"
    save_file({f"{module}.weight": weights[qkv][6:12].contiguous()}, tmp_path / "alone.safetensors")
    loratool.merge(tmp_path / "alone.safetensors", adapter, tmp_path / "alone-out.safetensors")
    (alone,) = load_file(tmp_path / "alone-out.safetensors").values()
    weights[qkv] = torch.cat([weights[qkv][:6], alone, weights[qkv][12:]])
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], x) for name, x in weights.items())
    loratool.unmerge(tmp_path / "out.safetensors", adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_a_module_whose_rows_are_moved_is_refused(tmp_path: Path) -> None:
    """Each half of this one lies elsewhere in the base, and half a module does not tell what its numbers mean."""
    _, base, adapter = single_file(tmp_path, "norm_out.linear")
    with pytest.raises(
        InputError, match="has 6 of the 12 rows of norm_out.linear, whose change depends on all of them"
    ):
        loratool.merge(base, adapter, tmp_path / "out.safetensors")


def test_a_spectrum_of_zeros_changes_nothing(tmp_path: Path) -> None:
    """As peft starts it; weights of 0 and -0 stay as they are, too."""
    for variant in ("fourierft", "waveft", "waveft, places"):
        write(tmp_path, variant)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: torch.zeros_like(x) for name, x in load_file(file).items()}, file)
        base = tmp_path / "base.safetensors"
        weights = load_file(base)
        weights["wide.weight"][:, :9], weights["wide.weight"][:, 9:12] = 0.0, -0.0
        save_file(weights, base)
        loratool.merge(base, tmp_path / "adapter", tmp_path / "out.safetensors", force=True)
        found = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(found[n].view(torch.int64), x.view(torch.int64)) for n, x in weights.items())


@pytest.mark.parametrize(
    "other",
    [{"random_loc_seed": 778}, {"scaling": 26.0}, {"wavelet_family": "db4"}, {"use_idwt": False}],
    ids=lambda other: next(iter(other)),
)
def test_a_config_of_another_adapter_is_seen(tmp_path: Path, other: dict[str, Any]) -> None:
    """unmerge refuses it, verify says no, and diff tells them apart, though the weights files are equal."""
    write(tmp_path, "waveft, sym4")
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors"
    loratool.merge(base, adapter, out)
    changed = Path(shutil.copytree(adapter, tmp_path / "changed"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**config, **other}))
    with pytest.raises(InputError):
        loratool.unmerge(out, changed, tmp_path / "back.safetensors")
    assert loratool.verify(base, changed, out).status == "wrong"
    found: Any = loratool.diff(adapter, changed)
    assert not found.same and {value.relative for value in found.values} == {1.0}
    same: Any = loratool.diff(adapter, adapter)
    assert same.same
