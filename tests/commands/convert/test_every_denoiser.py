"""Hold what `convert` takes adapters of diffusers' transformers for, all of its classes: their own family or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import slow
from lib.models import every_denoiser
from safetensors.torch import load_file

import loratool
from loratool.architectures.families import FAMILIES
from loratool.errors import InputError, LoratoolError, NeedsFlag

MODULES: dict[str, Callable[[str], bool]] = {
    "all": lambda path: path != "lm_head",  # Cosmos 3's, which its table has not
    "attention": lambda path: path.rpartition(".")[2] in ("to_q", "to_k", "to_v", "add_q_proj") or ".to_out" in path,
    "queries": lambda path: path.endswith(("to_q", "to_query")),
    "feed-forward": lambda path: ".net." in path or path.endswith("proj_mlp"),
}
# Models that were taken for another family, and one whose class has no table
DEFAULT = (
    ("AnyFlowTransformer3DModel", "tiny", "attention"),
    ("DreamLiteTransformer2DModel", "real", "all"),
    ("MotifVideoTransformer3DModel", "real", "attention"),
    ("MotifVideoTransformer3DModel", "tiny", "all"),
    ("SanaVideoTransformer3DModel", "tiny", "all"),
)
CASES = list(itertools.product(sorted(every_denoiser.classes()), ("real", "tiny"), MODULES))


def families_of(name: str) -> set[str]:
    return {key for key, each in FAMILIES.items() if name in (each.diffusers_class, *each.other_classes)}


def written(adapter: Path, **options: Any) -> Iterator[tuple[str, str | None, set[str], LoratoolError | None]]:
    """Yield each format with the family and the modules of what `convert` writes, or with its error."""
    for to in ("kohya", "comfy", "diffusers"):
        out = adapter.with_name(f"{to}.safetensors")
        try:
            report: Any = loratool.convert(adapter, out, to=to, force=True, **options)
            yield to, report.family, {name.partition(".lora_")[0] for name in load_file(out)}, None
        except LoratoolError as error:
            yield to, None, set(), error


@pytest.mark.parametrize(
    ("name", "size", "modules"),
    [case if case in DEFAULT else slow(*case) for case in CASES],
)
def test_an_adapter_is_of_its_classs_family_or_of_none(name: str, size: str, modules: str, tmp_path: Path) -> None:
    """Without a base by names and sizes of all its modules, with one by its config; without a table it is of none."""
    own = families_of(name)
    alike = {FAMILIES[key].repeats for key in own}
    for case in every_denoiser.sizes_of(name):
        if (case == "real") != (size == "real"):
            continue
        model = every_denoiser.build(name, case)
        base = every_denoiser.write_base(tmp_path / case.replace("/", "-"), model)
        shapes = {path: shape for path, shape in every_denoiser.linears(model).items() if MODULES[modules](path)}
        names = {f"transformer.{path}" for path in shapes}
        for prefix in ("transformer.", "lora_unet_") if shapes else ():
            where = case, prefix
            adapter = every_denoiser.write_adapter(tmp_path / "a.safetensors", shapes, prefix)
            for to, family, found, error in written(adapter):
                assert family in {None, *own, *alike}, (where, to, family)
                assert error is None or isinstance(error, NeedsFlag | InputError), (where, to, error)
                assert to == "diffusers" or error or own, (where, to, found)
                assert to != "diffusers" or error or found == names, (where, to)
            for to, family, found, error in (
                *written(adapter, base=base),
                *written(adapter, base=base / "config.json"),
            ):
                if own:
                    assert family in own or (len(own) > 1 and not error) or isinstance(error, InputError), (where, to)
                    assert to != "diffusers" or found == names, (where, to, error)
                elif "adapter_config.json" not in str(error):  # as of a language model, by names that both have
                    assert isinstance(error, InputError) and error.exit_code == 3, (where, to, error)
                    assert name in str(error) or "known image model" in str(error), (where, to, error)


def test_every_class_of_a_table_is_one_of_diffusers() -> None:
    """But for the UNets, and OmniGen 2, whose class its makers have."""
    known = {*every_denoiser.classes(), "UNet2DConditionModel", "UNetMotionModel", "OmniGen2Transformer2DModel"}
    assert {name for each in FAMILIES.values() for name in (each.diffusers_class, *each.other_classes) if name} <= known
