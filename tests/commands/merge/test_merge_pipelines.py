"""Merge into folders of diffusers pipelines: each component takes its modules, and all else stays, byte for byte.

diffusers is not needed: the layout of the folders and the names of the modules are literals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights
from lib.models.diffusers_folders import INDEX, LAYER, SDXL, pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError

# kohya's name, diffusers' name -> the component, the tensor there
NAMES = {
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ): ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv"): (
        "unet",
        "up_blocks.0.upsamplers.0.conv.weight",
    ),
    ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder.encoder.layers.0.self_attn.q_proj"): (
        "text_encoder",
        f"text_model.{LAYER}",
    ),
    (
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ): ("text_encoder_2", LAYER),
}


def adapter(path: Path, kohya: bool, components: tuple[str, ...] = tuple(SDXL)) -> dict[tuple[str, str], Tensor]:
    """Write an adapter file of some components; return its delta of each tensor, (component, name) -> B A."""
    tensors, changes = {}, {}
    for seed, ((flat, dotted), (component, name)) in enumerate(NAMES.items()):
        if component not in components:
            continue
        shape = next(shapes[name] for shapes in SDXL[component].values() if name in shapes)
        A, B = factors(shape[0], torch.Size(shape[1:]).numel(), 2, seed=seed)
        changes[component, name] = (B.double() @ A.double()).reshape(shape)
        A, B = A.reshape(2, *shape[1:]), B.reshape(shape[0], 2, *[1] * (len(shape) - 2))
        ends = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
        tensors |= {(flat if kohya else dotted) + end: x for end, x in zip(ends, (A, B), strict=True)}
    save_file(tensors, path)
    return changes


def lora(path: Path, A: Tensor, B: Tensor, *modules: str) -> None:
    """Write an adapter with the same factors for several modules, in diffusers' names."""
    ends = {"lora_A.weight": A, "lora_B.weight": B}
    save_file({f"{name}.{end}": x.clone() for name in modules for end, x in ends.items()}, path)


def load(folder: Path) -> dict[tuple[str, str], Tensor]:
    return {
        (file.parent.name, name): tensor
        for file in folder.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
    }


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check(base: Path, merged: Path, changes: Mapping[tuple[str, str], Tensor]) -> None:
    one, two = load(base), load(merged)
    assert one.keys() == two.keys()
    for name, W in one.items():
        if name in changes:
            assert torch.allclose(two[name].double(), W.double() + changes[name], atol=1e-8)
            assert not torch.equal(two[name], W)
        else:
            assert torch.equal(two[name], W)


@pytest.mark.parametrize("kohya", [True, False])
def test_merge_verify_and_unmerge(kohya: bool, tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    changes = adapter(tmp_path / "a.safetensors", kohya)
    report = loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    check(base, tmp_path / "out", changes)
    assert {row.name for row in report.tensors} == {f"{component}/{name}" for component, name in changes}
    assert not report.not_copied and not report.left_out
    before, after = files(base), files(tmp_path / "out")
    assert after.keys() - before.keys() == {"README.md", "loratool.undo"} and not before.keys() - after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        *(f"unet/{file}" for file in SDXL["unet"]),
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    }
    index = json.loads(after["unet/diffusion_pytorch_model.safetensors.index.json"])
    assert index["weight_map"] == {name: file for file, shapes in SDXL["unet"].items() for name in shapes}
    assert loratool.verify(base, [tmp_path / "a.safetensors"], tmp_path / "out").status == "proven"
    assert loratool.verify(base, [(tmp_path / "a.safetensors", 0.5)], tmp_path / "out").status == "wrong"
    undone = loratool.unmerge(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "again")
    assert files(tmp_path / "again") == before and undone.exact_files


def test_what_no_module_touches_keeps_its_bytes(tmp_path: Path) -> None:
    """An adapter of the text encoder alone: the UNet's shards and index, and its files of no merge, stay."""
    base = pipeline(tmp_path / "base")
    changes = adapter(tmp_path / "a.safetensors", True, ("text_encoder",))
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    check(base, tmp_path / "out", changes)
    before, after = files(base), files(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"text_encoder/model.safetensors"}


def test_stacked_merges_come_off_in_order(tmp_path: Path) -> None:
    """Each component knows the last merge that changed it; the pipeline's last is the longest record."""
    base = pipeline(tmp_path / "base")
    for i, component in enumerate(("unet", "text_encoder", "text_encoder_2")):
        adapter(tmp_path / f"{i}.safetensors", False, (component,))
        loratool.merge(tmp_path / str(i - 1) if i else base, tmp_path / f"{i}.safetensors", tmp_path / str(i))
    value = json.loads(loratool.inspect(tmp_path / "2").metadata["loratool"])  # type: ignore[union-attr]
    assert "former" in value["former"] and "former" not in value["former"]["former"]
    for i in (2, 1, 0):
        loratool.unmerge(tmp_path / str(i), tmp_path / f"{i}.safetensors", tmp_path / f"back{i}")
        assert files(tmp_path / f"back{i}") == files(tmp_path / str(i - 1) if i else base)


def test_another_type_and_shards(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    adapter(tmp_path / "a.safetensors", False)
    out = tmp_path / "out"
    loratool.merge(base, tmp_path / "a.safetensors", out, dtype="bf16", max_shard_size=1000, undo=False)
    assert {tensor.dtype for tensor in load(out).values()} == {torch.bfloat16}
    assert json.loads((out / "text_encoder/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((out / "text_encoder_2/config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "vae/config.json").read_bytes() == (base / "vae/config.json").read_bytes()
    index = json.loads((out / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for shapes in SDXL["unet"].values() for name in shapes}
    assert index["metadata"]["total_size"] == sum(t.nbytes for (part, _), t in load(out).items() if part == "unet")
    loratool.merge(base, tmp_path / "a.safetensors", out, force=True)  # what we wrote may be replaced
    (out / "unet/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"unet/notes\.txt"):
        loratool.merge(base, tmp_path / "a.safetensors", out, force=True)


def test_one_file_of_several_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    adapter(tmp_path / "a.safetensors", False)
    others = ["text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "old.ckpt"]
    for name in (*others, "vae/diffusion_pytorch_model.fp16.safetensors"):
        (base / name).write_bytes(b"not read")
    report = loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert sorted(report.not_copied) == sorted([*others, "vae/diffusion_pytorch_model.fp16.safetensors"])


def test_torch_weights_where_there_is_nothing_else(tmp_path: Path) -> None:
    """Single files and shards; what comes back is safetensors, with an index where there are shards."""
    base = pipeline(tmp_path / "base")
    changes = adapter(tmp_path / "a.safetensors", False)
    original = pipeline(tmp_path / "original")
    for file in base.glob("*/*.safetensors"):
        name = file.name.replace("safetensors", "bin")
        torch.save(load_file(file), file.with_name(name if "diffusion" in name else f"pytorch_{name}"))
        file.unlink()
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text().replace("safetensors", "bin")
    index.with_name("diffusion_pytorch_model.bin.index.json").write_text(text)
    index.unlink()
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    loratool.unmerge(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "again")
    check(original, tmp_path / "out", changes)
    check(original, tmp_path / "again", {})
    assert files(tmp_path / "again").keys() == files(original).keys()
    assert loratool.verify(base, tmp_path / "a.safetensors", tmp_path / "out").status == "proven"
    report = loratool.inspect(tmp_path / "again")
    assert report.files == loratool.inspect(original).files  # type: ignore[union-attr]


FLUX = {
    "transformer": {
        "diffusion_pytorch_model.safetensors": {
            "transformer_blocks.0.attn.to_q.weight": (6, 6),
            "transformer_blocks.0.attn.to_k.weight": (6, 6),
            "transformer_blocks.0.attn.to_v.weight": (6, 6),
            "single_transformer_blocks.0.proj_out.weight": (6, 30),
        }
    },
    "text_encoder": {"model.safetensors": {f"text_model.{LAYER}": (8, 8)}},
    "text_encoder_2": {"model.safetensors": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}},
}


def flux_pipeline(path: Path) -> Path:
    pipeline(path, FLUX)
    index = {name: INDEX[name] for name in ("text_encoder", "text_encoder_2")}
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("encoder", ["te2", "te3"])
def test_flux(encoder: str, tmp_path: Path) -> None:
    """Black Forest Labs' fused qkv falls apart; kohya calls T5 the third encoder, OneTrainer the second."""
    base = flux_pipeline(tmp_path / "base")
    (qA, qB), (tA, tB) = factors(18, 6, 2, seed=1), factors(8, 8, 2, seed=2)
    stem, t5 = "lora_unet_double_blocks_0_img_attn_qkv", f"lora_{encoder}_encoder_block_0_layer_0_SelfAttention_q"
    save_file(
        {
            f"{stem}.lora_down.weight": qA,
            f"{stem}.lora_up.weight": qB,
            f"{t5}.lora_down.weight": tA,
            f"{t5}.lora_up.weight": tB,
        },
        tmp_path / "a.safetensors",
    )
    D = qB.double() @ qA.double()
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    changes = {("transformer", name): D[6 * i : 6 * i + 6] for i, name in enumerate(names)}
    changes["text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight"] = tB.double() @ tA.double()
    report = loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    check(base, tmp_path / "out", changes)
    assert sorted(report.not_copied) == ["scheduler/", "tokenizer/"]  # no components by this model_index.json


def test_a_clip_by_itself_as_transformers_5_saves_it(tmp_path: Path) -> None:
    A, B = factors(12, 12, 2)
    save_file(
        {LAYER: weights(12, 12), "embeddings.token_embedding.weight": weights(20, 12)}, tmp_path / "b.safetensors"
    )
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}, tmp_path / "a.safetensors")
    loratool.merge(tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    expected = weights(12, 12).double() + B.double() @ A.double()
    assert torch.allclose(load_file(tmp_path / "out.safetensors")[LAYER].double(), expected, atol=1e-8)


def _lose_folder(base: Path) -> None:
    for path in (base / "text_encoder_2").iterdir():
        path.unlink()
    (base / "text_encoder_2").rmdir()


def _lose_weights(base: Path) -> None:
    (base / "text_encoder/model.safetensors").unlink()


def _lose_shard(base: Path) -> None:
    (base / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def _leave(base: Path) -> None:
    (base / "model_index.json").write_text(json.dumps({**INDEX, "../vae": ["diffusers", "AutoencoderKL"]}))


BROKEN = {
    "names text_encoder_2": _lose_folder,
    r"holds no weights": _lose_weights,
    "which is missing": _lose_shard,
    "not a folder beside it": _leave,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_pipeline_is_refused(message: str, tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    adapter(tmp_path / "a.safetensors", False)
    BROKEN[message](base)
    with pytest.raises(InputError, match=message):
        loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    base, a = pipeline(tmp_path / "base"), tmp_path / "a.safetensors"
    A, B = factors(8, 8, 2)
    names = ["vae.decoder.up_blocks.0.upsamplers.0.conv", "transformer.single_transformer_blocks.0.proj_out"]
    for name in names:  # another family's modules; a VAE is no target
        lora(a, A, B, name)
        with pytest.raises(InputError, match="1 of 1 modules are not in the base"):
            loratool.merge(base, a, tmp_path / "out", alpha=None if name in names[1:] else 2)
    to_q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    twice = [f"unet.{to_q}", "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q"]
    lora(a, A, B, *twice)
    with pytest.raises(InputError, match=f"{twice[0]} and {twice[1]}"):
        loratool.merge(base, a, tmp_path / "out")
    lora(a, A, B, twice[0], names[1])
    with pytest.raises(NeedsFlag, match="proj_out"):
        loratool.merge(base, a, tmp_path / "out")
    with pytest.raises(UsageError, match="a pipeline needs a folder"):
        loratool.merge(base, a, tmp_path / "out.safetensors", exclude=("proj_out",))
    loratool.merge(base, a, tmp_path / "out", exclude=("proj_out",))
    assert loratool.diff(base, tmp_path / "out").kind == "checkpoints"  # type: ignore[union-attr]
    for verb in (loratool.extract, loratool.init):
        with pytest.raises(InputError, match="base/text_encoder"):
            verb(base, *([tmp_path / "out"] if verb is loratool.extract else []), out=tmp_path / "e", to="peft")  # type: ignore[operator]
    edited = tmp_path / "out/vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(edited).items()}, edited)
    assert loratool.verify(base, [a], tmp_path / "out", exclude=("proj_out",)).status == "wrong"
    with pytest.raises(InputError, match="edited since"):
        loratool.unmerge(tmp_path / "out", a, tmp_path / "again")


@pytest.mark.parametrize(
    "use",
    [
        lambda base, a, out: loratool.merge(base, a, out),
        lambda base, a, out: loratool.diff(a, a, base=base),
        lambda base, a, out: loratool.spectra(base),
        lambda base, a, out: loratool.extract(base, base, out),
        lambda base, a, out: loratool.init(base, out),
    ],
    ids=["merge", "diff", "spectra", "extract", "init"],
)
def test_a_component_that_is_quantized(use: Callable[[Path, Path, Path], object], tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    adapter(tmp_path / "a.safetensors", False)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    file = next(file for file in (base / "unet").glob("*.safetensors") if name in load_file(file))
    state = load_file(file)
    state[name] = state[name].to(torch.float8_e4m3fn)
    scale = name.replace(".weight", ".some_scales")
    save_file({**state, scale: torch.ones(1)}, file, {"format": "pt"})
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"][scale] = file.name
        index.write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"is quantized \(an unknown fp8 format\)"):
        use(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extract_writes_diffusers_by_component(tmp_path: Path, run: Callable[..., Any]) -> None:
    """All that an adapter changed comes back, whichever names transformers gave the text encoders; and from a dump."""
    base = pipeline(tmp_path / "base")
    changes = adapter(tmp_path / "a.safetensors", True)
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "tuned", undo=False)
    vae = tmp_path / "tuned/vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(vae).items()}, vae)
    report = loratool.extract(base, tmp_path / "tuned", tmp_path / "e.safetensors", rank=2)
    assert {row.name for row in report.modules} == {f"{component}/{name}" for component, name in changes}
    assert list(report.left_out) == ["vae/decoder.up_blocks.0.upsamplers.0.conv.weight"]
    names = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "e.safetensors")}
    assert names == {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.0.upsamplers.0.conv",
        f"text_encoder.text_model.{LAYER.removesuffix('.weight')}",
        f"text_encoder_2.{LAYER.removesuffix('.weight')}",
    }
    loratool.merge(base, tmp_path / "e.safetensors", tmp_path / "again", undo=False)
    one, two = load(tmp_path / "again"), load(tmp_path / "tuned")
    for part, name in one:
        assert part == "vae" or torch.allclose(one[part, name], two[part, name], atol=1e-6)
    loratool.extract(base, tmp_path / "tuned", tmp_path / "k.safetensors", rank=2, to="kohya")
    layer = "self_attn_q_proj.alpha"
    assert f"lora_te2_text_model_encoder_layers_0_{layer}" in load_file(tmp_path / "k.safetensors")
    result = run("extract", base, tmp_path / "tuned", "--to", "peft", "-o", tmp_path / "p")
    assert result.exit_code == 3 and "base/text_encoder" in result.stderr


def test_a_flux_pipelines_own_names(tmp_path: Path) -> None:
    """Its second text encoder is a T5, the third one in kohya's names; its q, k and v are one module there."""
    base = flux_pipeline(tmp_path / "base")
    for to, form in (("diffusers", None), ("kohya", "kohya")):
        loratool.init(base, tmp_path / f"{to}.safetensors", rank=2, to=form, exclude=["to_k"])
    found = load_file(tmp_path / "diffusers.safetensors")
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    assert (
        f"text_encoder_2.{t5}.lora_A.weight" in found
        and "transformer.transformer_blocks.0.attn.to_v.lora_A.weight" in found
    )
    kohya = load_file(tmp_path / "kohya.safetensors")
    assert f"lora_te3_{t5.replace('.', '_')}.alpha" in kohya
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    assert kohya[f"{qkv}.lora_down.weight"].shape == (4, 6) and kohya[f"{qkv}.lora_up.weight"].shape == (18, 4)


def test_inspect_names_the_components(tmp_path: Path, run: Callable[..., Any]) -> None:
    base = pipeline(tmp_path / "base")
    result = run("inspect", str(base), "--json")
    assert result.exit_code == 0 and "unet/conv_in.weight" in result.stdout


# the weights of an adapter -> those of the UNet and of the two text encoders
WEIGHTS: list[tuple[str, tuple[float, float, float]]] = [
    (":0.8,te=0.4", (0.8, 0.4, 0.4)),
    (":te2=0.25,unet=2", (2.0, 1.0, 0.25)),
    (":0.5,te1=0,te=-1", (0.5, 0.0, -1.0)),
]


@pytest.mark.parametrize(("text", "expected"), WEIGHTS)
@pytest.mark.parametrize("kohya", [True, False])
def test_weights_of_components(
    text: str, expected: tuple[float, float, float], kohya: bool, tmp_path: Path, run: Callable[..., Any]
) -> None:
    base, a, out = pipeline(tmp_path / "base"), tmp_path / "a.safetensors", tmp_path / "out"
    changes = adapter(a, kohya)
    weight = dict(zip(("unet", "text_encoder", "text_encoder_2"), expected, strict=True))
    assert run("merge", base, f"{a}{text}", "-o", out).exit_code == 0
    check(base, out, {(part, name): weight[part] * D for (part, name), D in changes.items() if weight[part]})
    assert run("verify", base, f"{a}{text}", out).exit_code == 0
    assert run("verify", base, f"{a}:0.8", out).exit_code == 1
    refused = run("unmerge", out, f"{a}:0.8", "-o", tmp_path / "again")
    assert refused.exit_code == 3 and "was merged with weight" in refused.stderr and "not 0.8" in refused.stderr
    assert run("unmerge", out, f"{a}{text}", "-o", tmp_path / "again").exit_code == 0
    assert files(tmp_path / "again") == files(base)
    near = run("unmerge", out, f"{a}{text}", "--approximate", "-o", tmp_path / "near")
    assert near.exit_code == 0
    for name, W in load(base).items():
        assert torch.allclose(load(tmp_path / "near")[name], W, atol=1e-6)


def test_the_same_weights_in_other_words_are_the_same(tmp_path: Path) -> None:
    base, a = pipeline(tmp_path / "base"), tmp_path / "a.safetensors"
    adapter(a, True)
    loratool.merge(base, (a, 0.8, {"te": 0.4}), tmp_path / "one")
    loratool.merge(base, [(a, 0.8, {"te2": 0.4, "te1": 0.4})], tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    adapter(tmp_path / "b.safetensors", True, ("unet",))
    with pytest.raises(UsageError, match=r"b\.safetensors: has no module that te=0\.4 matches"):
        loratool.merge(base, (tmp_path / "b.safetensors", 0.8, {"te": 0.4}), tmp_path / "out")
    with pytest.raises(UsageError, match=r"a\.safetensors: has no module that vae=0\.4 matches"):
        loratool.merge(base, (a, 0.8, {"vae": 0.4}), tmp_path / "out")
    with pytest.raises(UsageError, match="not a finite number"):
        loratool.merge(base, (a, 0.8, {"te": float("nan")}), tmp_path / "out")
