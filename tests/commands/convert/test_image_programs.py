"""Hold what is written for image programs to their own code: the weights that they make are those of a merge.

`lib/oracles/image_programs.py` runs the programs. The models are diffusers', at tiny widths, with an adapter on every
linear layer, no two of which share an A; PEFT's merge, or its formula, is what all must give.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from lib.models import dit_models
from lib.models.dit_spellings import Subject, merged_by_peft, telling_widths
from lib.oracles import image_programs as programs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag
from loratool.architectures.families.table import Naming
from loratool.architectures.runtimes.image_programs import IMAGE_RUNTIMES

pytestmark = pytest.mark.slow

NAMES = {Naming.MAKER: "maker", Naming.DIFFUSERS: "diffusers", Naming.COMFY: "comfy"}
NEAR = 1e-6  # of float32's sums


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with telling_widths():
        yield
    torch.set_num_threads(threads)


def cases(runtime: str) -> list[str]:
    return [case for case in dit_models.MODELS if dit_models.family_of(case) in IMAGE_RUNTIMES[runtime].families]


def written(subject: Subject, adapter: Path, runtime: str) -> tuple[Path, frozenset[str]]:
    """Convert an adapter for a program; return also the modules that had to be excluded, by diffusers' paths."""
    out, base = subject.place(".safetensors"), subject.base_in("component")
    options: dict[str, list[str]] = {}
    try:
        loratool.convert(adapter, out, runtime=runtime, base=base)
    except NeedsFlag as error:
        assert error.asks_for("--exclude"), error
        options = {"exclude": [word for word in shlex.split(error.flags) if word != "--exclude"]}
        loratool.convert(adapter, out, runtime=runtime, base=base, **options)
    report = loratool.convert(adapter, subject.place(".safetensors"), runtime=runtime, base=base, **options)
    return out, frozenset(module.removeprefix("transformer.") for module in report.dropped)


def expected(subject: Subject, naming: str, excluded: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Return the merged weights in a naming, without the changes of some modules."""
    kept = {n: subject.base[n] if n.removesuffix(".weight") in excluded else W for n, W in subject.fused.items()}
    return subject.renamed(naming, kept)


def require_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=NEAR * float(tensor.abs().max()))


def naming_in_comfy(subject: Subject) -> str:
    return "comfy" if "comfy" in subject.namings else "maker"


@pytest.mark.parametrize("case", cases("comfyui"))
def test_comfyui_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    naming = naming_in_comfy(subject)
    out, excluded = written(subject, subject.adapter("diffusers"), "comfyui")
    assert not excluded
    found, _, unused = programs.comfyui(load_file(out), subject.renamed(naming, subject.base))
    assert not unused
    require_equal(found, expected(subject, naming))


def dora_of(subject: Subject, folder: Path) -> Path:
    """Write the subject's adapter as DoRA along the outputs, with magnitudes of their own."""
    tensors, g = load_file(subject.adapter("diffusers")), torch.Generator().manual_seed(5)
    for path, (_, B) in subject.factors.items():
        norms = subject.base[f"{path}.weight"].norm(dim=1)
        tensors[f"transformer.{path}.lora_magnitude_vector"] = norms * (1 + 0.2 * torch.randn(len(B), generator=g))
    save_file(tensors, folder / "dora.safetensors")
    return folder / "dora.safetensors"


@pytest.mark.parametrize("layout", ["component", "model.diffusion_model."])
@pytest.mark.parametrize("case", ["flux", "wan", "qwen_image", "sd3", "hunyuan_video"])
class TestDoraForComfyUI:
    def test_it_acts_as_a_merge_at_any_strength(self, case: str, layout: str, tmp_path: Path) -> None:
        subject = Subject(case, tmp_path).other
        naming, adapter, base = naming_in_comfy(subject), dora_of(subject, tmp_path), subject.base_in(layout)
        loratool.convert(adapter, tmp_path / "out.safetensors", runtime="comfyui", base=base)
        plain, wanted = subject.renamed(naming, subject.base), subject.merged(adapter, "component")
        merged = subject.renamed(naming, subject.read(wanted, "component"))
        for strength in (1.0, 0.5):
            found, _, unused = programs.comfyui(load_file(tmp_path / "out.safetensors"), plain, strength=strength)
            assert not unused
            require_equal(found, {n: W + strength * (merged[n] - W) for n, W in plain.items()})

    def test_its_spelling_alone_does_not(self, case: str, layout: str, tmp_path: Path) -> None:
        subject = Subject(case, tmp_path).other
        naming, adapter = naming_in_comfy(subject), dora_of(subject, tmp_path)
        base = subject.base_in(layout)
        report = loratool.convert(adapter, tmp_path / "out.safetensors", to="comfy", base=base)
        assert any("--for comfyui" in note for note in report.notes)
        found, _, _ = programs.comfyui(load_file(tmp_path / "out.safetensors"), subject.renamed(naming, subject.base))
        merged = subject.renamed(naming, subject.read(subject.merged(adapter, "component"), "component"))
        assert max(float((found[n] - W).abs().max() / W.abs().max()) for n, W in merged.items()) > 0.01

    def test_the_file_is_for_it_alone(self, case: str, layout: str, tmp_path: Path) -> None:
        subject = Subject(case, tmp_path)
        adapter, base = dora_of(subject, tmp_path), subject.base_in(layout)
        loratool.convert(adapter, tmp_path / "out.safetensors", runtime="comfyui", base=base)
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert file.metadata()["loratool_only_for"] == "comfyui"
        with pytest.raises(InputError, match="is only for comfyui"):
            loratool.merge(base, tmp_path / "out.safetensors", tmp_path / "merged.safetensors")
        with pytest.raises(NeedsFlag, match="--base BASE"):
            loratool.convert(adapter, tmp_path / "other.safetensors", runtime="comfyui")


@pytest.mark.parametrize("case", cases("diffusers"))
def test_diffusers_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    out, excluded = written(subject, subject.adapter("diffusers"), "diffusers")
    assert not excluded
    model = dit_models.build(case)
    programs.diffusers_loads(out, subject.family.key, model)
    require_equal(merged_by_peft(model), expected(subject, "diffusers"))


@pytest.mark.parametrize("case", [case for case in cases("musubi") if case != "hunyuan_video/framepack"])
def test_musubi_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    naming = NAMES[subject.family.kohya]
    out, excluded = written(subject, subject.adapter("diffusers"), "musubi")
    save_file(
        {n: t.contiguous() for n, t in subject.renamed(naming, subject.base).items()}, tmp_path / "base.safetensors"
    )
    found = programs.musubi(tmp_path / "base.safetensors", load_file(out))
    require_equal(found, expected(subject, naming, excluded))


@pytest.mark.parametrize(
    "case", [case for case in cases("sd-scripts") if dit_models.family_of(case) in programs.CLASSES]
)
def test_sd_scripts_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    naming = NAMES[subject.family.kohya]
    out, excluded = written(subject, subject.adapter("diffusers"), "sd-scripts")
    found = programs.sd_scripts(subject.family.key, subject.renamed(naming, subject.base), load_file(out))
    wanted = expected(subject, naming, excluded)
    assert {name for name, tensor in wanted.items() if name.endswith(".weight") and tensor.dim() == 2} == found.keys()
    require_equal(found, {name: wanted[name] for name in found})
