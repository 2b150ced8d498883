"""Hold which family an adapter is given to: its own or none, never that of another model with the same names.

Names and shapes are those of diffusers' own classes, with and without a table of ours.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.models import dit_models
from lib.models.dit_models import MODELS, WAN, family_of
from lib.models.dit_spellings import Subject
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.architectures.families import FAMILIES
from loratool.architectures.families.lookup import locate
from loratool.errors import InputError, LoratoolError, NeedsFlag

diffusers = dit_models.diffusers

UNKNOWN = "OtherTransformer3DModel"  # a class of no table

# classes that diffusers loads with another family's reader of adapters
AS_WAN = ("SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel")
FORMATS = ("kohya", "comfy", "diffusers", "peft")
MODULES: dict[str, Callable[[str], bool]] = {
    "all": lambda path: True,
    "attention": lambda path: path.rpartition(".")[2] in ("to_q", "to_k", "to_v", "add_q_proj") or ".to_out." in path,
    "queries": lambda path: path.endswith("to_q"),
    "feed-forward": lambda path: ".net." in path or path.endswith("proj_mlp"),
}
QUICK = ("flux", "wan", "anima", "hunyuan_video")


def quick(names: tuple[str, ...] | Any, kept: tuple[str, ...]) -> list[Any]:
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


def write(path: Path, model: nn.Module, modules: str, prefix: str) -> Path | None:
    """Write an adapter of some of a model's linear layers; None if it has none of these."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and MODULES[modules](name):
            rows, columns = layer.weight.shape
            flat = prefix.endswith("_")
            stem = prefix + (name.replace(".", "_") if flat else name)
            down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
            tensors |= {f"{stem}.{down}.weight": torch.ones(2, columns), f"{stem}.{up}.weight": torch.ones(rows, 2)}
            tensors |= {f"{stem}.alpha": torch.tensor(2.0)} if flat else {}
    if tensors:
        save_file(tensors, path)
    return path if tensors else None


def outcomes(adapter: Path, **options: Any) -> Iterator[tuple[str, str | LoratoolError | None]]:
    """Yield each format with the family that `convert` gives an adapter to, or its error."""
    for to in FORMATS:
        out = adapter.parent / f"{to}{len(list(adapter.parent.iterdir()))}"
        try:
            report: Any = loratool.convert(adapter, out.with_suffix(".safetensors"), to=to, **options)
            yield to, report.family
        except LoratoolError as error:
            yield to, error


def rename_class(base: Path) -> Path:
    """Let a base's config name a class that no table has."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_class_name": UNKNOWN}))
    return base


@pytest.mark.parametrize("prefix", ["transformer.", "lora_unet_"])
@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("case", quick(tuple(MODELS), ("flux", "motif_video", "sana_video", "anima")))
def test_the_base_of_an_unknown_class_is_of_no_family(case: str, modules: str, prefix: str, tmp_path: Path) -> None:
    """Whatever its modules are called, and though all of them are a known family's."""
    model = dit_models.build(case)
    model.save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "a.safetensors", model, modules, prefix)
    base = rename_class(tmp_path / "base")
    for to, found in outcomes(adapter, base=base) if adapter else ():
        assert isinstance(found, InputError) and found.exit_code == 3, (to, found)
        assert UNKNOWN in str(found) or "known image model" in str(found)


@pytest.mark.parametrize("class_name", AS_WAN)
def test_a_class_that_is_read_as_a_family_is_written_as_it(class_name: str, tmp_path: Path) -> None:
    model = getattr(diffusers, class_name)(**WAN)
    model.save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "a.safetensors", model, "attention", "transformer.")
    assert adapter is not None
    assert {found for _, found in outcomes(adapter, base=tmp_path / "base")} == {"wan"}
    assert {found for _, found in outcomes(adapter, architecture="wan")} == {"wan"}


def test_the_projections_of_ace_steps_makers_are_read_as_diffusers_does(tmp_path: Path) -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    ends = [f"{attention}.{each}" for attention in ("self_attn", "cross_attn") for each in ("q_proj", "o_proj")]
    names = [f"base_model.model.layers.{i}.{end}" for i in range(24) for end in (*ends, "mlp.gate_proj")]
    adapter = told(tmp_path / "a.safetensors", names, 2048)
    out = tmp_path / "b.safetensors"
    loratool.convert(adapter, out, to="diffusers", architecture="ace_step")
    assert load_file(out).keys() == utils._convert_non_diffusers_ace_step_lora_to_diffusers(load_file(adapter)).keys()


def families_of_class(case: str) -> set[str]:
    """The families of a case's class: the transformer of Anima is one of Cosmos-Predict2."""
    own = FAMILIES[family_of(case)].diffusers_class
    return {key for key, family in FAMILIES.items() if family.diffusers_class == own}


@pytest.mark.parametrize("case", quick(tuple(MODELS), ()))
def test_every_spelling_is_of_its_own_family_or_of_none(case: str, tmp_path: Path) -> None:
    """By the real models' widths, which no small model has; its base and --architecture tell it."""
    subject, own, key = Subject(case, tmp_path), families_of_class(case), family_of(case)
    for spelling in subject.spellings():
        adapter = subject.adapter(spelling)
        report: Any = loratool.inspect(adapter)
        assert report.family in {None, *own}, spelling
        for to, found in outcomes(adapter):
            assert found in {None, key} or isinstance(found, NeedsFlag | InputError), (spelling, to, found)
            if isinstance(found, NeedsFlag) and "--architecture" in (found.remedy or ""):
                named = f"--architecture {key}" in str(found.remedy) or FAMILIES[key].title in str(found)
                assert named or ", ..." in str(found.remedy) or "or of another" in str(found), found
        for to, found in outcomes(adapter, base=subject.base_in("component")):
            assert found in {None, *own} or isinstance(found, InputError | NeedsFlag), (spelling, to, found)
            assert "base" not in str(found) and "architecture" not in str(found), (spelling, to, found)


def test_what_else_names_a_base(tmp_path: Path) -> None:
    """Its config.json alone, a pipeline, and the maker's file of it do; a language model is none, nor an odd class."""
    subject = Subject("flux", tmp_path)
    adapter, component = subject.adapter("diffusers"), subject.base_in("component")
    for base in (component / "config.json", subject.base_in("pipeline"), subject.base_in("bare")):
        assert {found for _, found in outcomes(adapter, base=base)} == {"flux"}
    config = json.loads((component / "config.json").read_text())
    for odd in ("LlamaForCausalLM", "../x\n", ["FluxTransformer2DModel"], 3):
        other = tmp_path / f"odd{len(list(tmp_path.iterdir()))}"
        shutil.copytree(component, other)
        (other / "config.json").write_text(json.dumps({**config, "_class_name": odd}))
        for to, found in outcomes(adapter, base=other):
            assert isinstance(found, InputError) or (not isinstance(odd, str) and found == "flux"), (to, odd, found)
            assert str(found).count("\n") <= 1


def test_a_makers_file_is_no_class_of_pefts(tmp_path: Path) -> None:
    """By rows of a fused matrix, whose class nothing names: refused, where a StopIteration was."""
    subject = Subject("flux", tmp_path)
    with pytest.raises(InputError, match="which has no known class"):
        loratool.convert(subject.adapter("PEFT"), tmp_path / "out", to="peft", base=subject.base_in("bare"))


@pytest.mark.parametrize("case", quick(tuple(MODELS), QUICK))
def test_the_remedy_of_an_unknown_size_is_a_family_that_converts(case: str, tmp_path: Path) -> None:
    model = dit_models.build(case)
    for modules in MODULES:
        adapter = write(tmp_path / f"{modules}.safetensors", model, modules, "transformer.")
        for to, found in outcomes(adapter) if adapter else ():
            if isinstance(found, NeedsFlag) and "--architecture" in (found.remedy or ""):
                assert " or --base BASE" in str(found.remedy)
                for named in re.findall("--architecture [a-z0-9_]+", str(found.remedy)):
                    out = tmp_path / f"{modules}-{to}-{named.split()[1]}.safetensors"
                    report: Any = loratool.convert(adapter, out, to=to, architecture=named.split()[1])
                    assert report.family == named.split()[1]


@pytest.mark.parametrize("case", quick(tuple(MODELS), QUICK))
def test_the_base_of_another_family_is_named(case: str, tmp_path: Path) -> None:
    """The base's config names another class: no file is written, and both are named."""
    cases = list(MODELS)
    other = next(
        each
        for each in (*cases[cases.index(case) + 1 :], *cases)
        if not families_of_class(each) & families_of_class(case)
    )
    dit_models.build(other).save_pretrained(tmp_path / "base")
    model = dit_models.build(case)
    adapter = write(tmp_path / "a.safetensors", model, "all", "transformer.")
    assert adapter is not None
    if all(locate(FAMILIES[family_of(other)], path) for path in dit_models.linears(model)):
        return  # it has every module, as LTX-2 has LTX's
    for to, found in outcomes(adapter, base=tmp_path / "base"):
        assert isinstance(found, InputError), (to, found)
        assert any(FAMILIES[key].title in str(found) for key in families_of_class(other)), found
        assert any(FAMILIES[key].title in str(found) for key in FAMILIES if key in families_of_class(case)), found


def test_no_new_adapter_of_an_unknown_class_has_a_familys_names(tmp_path: Path) -> None:
    model = dit_models.build("flux")
    model.save_pretrained(tmp_path / "base")
    base = rename_class(tmp_path / "base")
    for to in ("kohya", "comfy"):
        with pytest.raises(InputError, match=UNKNOWN):
            loratool.init(base, tmp_path / f"{to}.safetensors", rank=2, to=to)
    out = tmp_path / "diffusers.safetensors"
    loratool.init(base, out, rank=2, to="diffusers")
    names = {name.removeprefix("transformer.").partition(".lora_")[0] for name in load_file(out)}
    assert names and names <= {name for name, _ in model.named_modules()}


def told(path: Path, names: Iterable[str], width: int) -> Path:
    """Write an adapter of square layers of this width."""
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(width, 1)}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("width", [3072, 1536, 16])
def test_the_attention_of_two_models_is_asked_for(width: int, tmp_path: Path) -> None:
    """By names and by its real sizes, Motif-Video's is HunyuanVideo's, and at no size it is Flux's."""
    names = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(20)]
    names += [f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(40)]
    adapter = told(tmp_path / "a.safetensors", names, width)
    assert loratool.inspect(adapter).family is None  # type: ignore[union-attr]
    for to in ("kohya", "comfy"):
        with pytest.raises(NeedsFlag) as caught:
            loratool.convert(adapter, tmp_path / f"{to}.safetensors", to=to)
        assert 'architecture="hunyuan_video"' in str(caught.value) and "base=BASE" in str(caught.value)
        report: Any = loratool.convert(adapter, tmp_path / f"{to}.safetensors", to=to, architecture="hunyuan_video")
        assert report.family == "hunyuan_video"
    assert loratool.convert(adapter, tmp_path / "b.safetensors", to="diffusers").family is None  # type: ignore[union-attr]
    config = tmp_path / "config.json"
    for class_name, family in (
        ("MotifVideoTransformer3DModel", "motif_video"),
        ("HunyuanVideoTransformer3DModel", "hunyuan_video"),
    ):
        config.write_text(json.dumps({"_class_name": class_name}))
        out = tmp_path / f"{family}.safetensors"
        assert loratool.convert(adapter, out, to="diffusers", base=config).family == family  # type: ignore[union-attr]
    config.write_text(json.dumps({"_class_name": "MotifVideoTransformer3DModel"}))
    with pytest.raises(InputError, match="Motif-Video"):
        loratool.convert(adapter, tmp_path / "c.safetensors", to="kohya", base=config)


def test_one_class_of_two_families_is_told_by_its_config(tmp_path: Path) -> None:
    """Cosmos 1 learns its positions, and Cosmos-Predict2 and Anima do not; at any width."""
    names = [f"transformer.transformer_blocks.{i}.attn1.to_k" for i in range(28)]
    adapter, config = told(tmp_path / "a.safetensors", names, 24), tmp_path / "config.json"
    for embedding, found in (("learnable", {"cosmos1"}), (None, {"anima", "cosmos_predict2", None})):
        config.write_text(json.dumps({"_class_name": "CosmosTransformer3DModel", "extra_pos_embed_type": embedding}))
        for to in ("kohya", "comfy"):
            out = tmp_path / f"{to}-{embedding}.safetensors"
            report: Any = loratool.convert(adapter, out, to=to, base=config)
            assert report.family in found
            makers = any("blocks.0.block" in name or "blocks_0_block" in name for name in load_file(out))
            assert makers == (embedding == "learnable")
