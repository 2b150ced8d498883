"""Hold LoRA of Segment Anything and of vision transformers against the code that trains, saves and runs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import PROGRAMS, load_model, oracle_folder, weights, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, NeedsFlag, UsageError

Import = Callable[[str, str], ModuleType]

MAKERS, TRANSFORMERS = "image_encoder.blocks", "vision_encoder.layers"


def written(path: Path, layers: int = 2, r: int = 2, width: int = 4, **others: Tensor) -> dict[str, Tensor]:
    tensors = {f"w_a_{n:03d}": weights(r, width, seed=n) for n in range(2 * layers)}
    tensors |= {f"w_b_{n:03d}": weights(width, r, seed=99 + n) for n in range(2 * layers)} | others
    save_file(tensors, path)
    return tensors


def a_base(folder: Path, layers: int = 2, width: int = 4, stem: str = MAKERS, **others: Tensor) -> dict[str, Tensor]:
    base = {f"{stem}.{n}.attn.qkv.weight": weights(3 * width, width, seed=50 + n) for n in range(layers)} | others
    config = {"model_type": "sam", "vision_config": {"model_type": "sam_vision_model", "num_hidden_layers": layers}}
    write_model(folder, base, config if stem == TRANSFORMERS else None)
    return base


def expected(W: Tensor, tensors: dict[str, Tensor], layer: int, scale: float = 1.0) -> Tensor:
    """Return a layer's weight after `qkv[..., :dim] += q`, `qkv[..., -dim:] += v`."""
    q, v = ((tensors[f"w_b_{n:03d}"].double() @ tensors[f"w_a_{n:03d}"].double()) for n in (2 * layer, 2 * layer + 1))
    W = W.double().clone()
    W[: len(q)] += scale * q
    W[-len(v) :] += scale * v
    return W.float()


@pytest.mark.parametrize("stem", [MAKERS, TRANSFORMERS])
def test_q_and_v_of_each_layer_are_changed(tmp_path: Path, stem: str) -> None:
    decoder = "mask_decoder.iou_token.weight"
    tensors = written(tmp_path / "a.safetensors", **{decoder: weights(1, 4, seed=7)})
    base = a_base(tmp_path / "base", stem=stem, **{decoder: weights(1, 4, seed=8)})
    report = loratool.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", undo=False)
    merged = load_model(tmp_path / "out")
    assert merged.keys() == base.keys() and len(report.tensors) == 3
    for n in range(2):
        name = f"{stem}.{n}.attn.qkv.weight"
        assert torch.equal(merged[name], expected(base[name], tensors, n))
    assert torch.equal(merged[decoder], tensors[decoder])


def test_a_base_of_another_depth_is_refused(tmp_path: Path) -> None:
    """The numbers are of the layers that were trained, whichever they were (`lora_layer`)."""
    written(tmp_path / "a.safetensors")
    trained = "if all its layers were trained"
    for layers, said in ((4, "half of the file is missing"), (3, trained), (1, trained)):
        for stem in (MAKERS, TRANSFORMERS):
            a_base(tmp_path / f"{layers}{stem}", layers, stem=stem)
            with pytest.raises(InputError, match=f"2 layers, numbered by their order, and the base has {layers}") as e:
                loratool.merge(tmp_path / f"{layers}{stem}", tmp_path / "a.safetensors", tmp_path / "out", undo=False)
            assert said in str(e.value.remedy)
    write_model(tmp_path / "other", {"model.layers.0.self_attn.q_proj.weight": weights(4, 4)})
    with pytest.raises(InputError, match=r"image_encoder\.blocks\.\{0\.\.1\}\.attn\.qkv"):
        loratool.merge(tmp_path / "other", tmp_path / "a.safetensors", tmp_path / "out", undo=False)


LACKING = {"every b": lambda n: n[2] == "b", "a pair": lambda n: n.endswith("001"), "a v": lambda n: n.endswith("3")}


@pytest.mark.parametrize("case", LACKING)
def test_half_a_file_is_refused(tmp_path: Path, case: str, run: Callable[..., Any]) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: each for name, each in written(path).items() if not LACKING[case](name)}, path)
    with pytest.raises(InputError, match=r"is missing( and \d others)?, of 8 tensors") as caught:
        open_adapter(path)
    assert "half of the file is missing" in str(caught.value.remedy)
    result = run("inspect", path, "--strict")
    assert result.exit_code == 1 and "half of the file is missing" in result.stdout


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(path, w_a_001=weights(3, 4))
    with pytest.raises(InputError, match="its pairs are"):
        open_adapter(path)


def test_a_vision_transformer_s_alpha_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    head = "fc_4in_3out"
    tensors = written(path, **{head: weights(3, 4, seed=9)})
    with pytest.raises(NeedsFlag, match="whose alpha is not stored"):
        open_adapter(path)
    with pytest.raises(UsageError, match="to a whole number, 0"):
        open_adapter(path, 1.0)
    base = a_base(tmp_path / "base", stem="blocks", **{"head.weight": weights(3, 4), "head.bias": weights(3)})
    adapter = open_adapter(path, 7.0)
    assert "the scale is 3" in adapter.notes[0] and "and not its bias" in adapter.missing[0]
    loratool.merge(tmp_path / "base", path, tmp_path / "out", alpha=7.0, undo=False)
    merged = load_model(tmp_path / "out")
    for n in range(2):
        name = f"blocks.{n}.attn.qkv.weight"
        assert torch.equal(merged[name], expected(base[name], tensors, n, 3))
    assert torch.equal(merged["head.weight"], tensors[head]) and torch.equal(merged["head.bias"], base["head.bias"])


def test_convert_needs_the_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(path)
    with pytest.raises(NeedsFlag, match="only the model tells"):
        loratool.convert(path, tmp_path / "peft", to="peft")
    a_base(tmp_path / "base", stem=TRANSFORMERS)
    loratool.convert(path, tmp_path / "peft", to="peft", base=tmp_path / "base")
    for adapter, out in ((path, "one"), (tmp_path / "peft", "two")):
        loratool.merge(tmp_path / "base", adapter, tmp_path / out, undo=False)
    one, two = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Import a module of a checkout, which other checkouts have under the same name too."""
    loaded = {*sys.modules}

    def run(checkout: str, module: str) -> ModuleType:
        if not (PROGRAMS / checkout).is_dir():
            pytest.skip(f"needs a checkout of {checkout} in {PROGRAMS}")
        for package in (
            ("image_programs", "torchvision"),
            ("sam", "timm icecream colorama executing asttokens einops"),
        ):
            monkeypatch.syspath_prepend(oracle_folder(*package))
        monkeypatch.syspath_prepend(PROGRAMS / checkout)
        return importlib.import_module(module)

    yield run
    for name in sys.modules.keys() - loaded:
        if name.startswith(("segment_anything", "lora", "base_vit", "sam_lora")):
            del sys.modules[name]


def randomize(model: nn.Module) -> None:
    for n, parameter in enumerate(model.parameters()):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["numbered", "state", "module.state"])
def test_a_file_of_samed_is_merged_as_its_model_runs_it(tmp_path: Path, trainer: Import, saved: str) -> None:
    samed = trainer("samed", "sam_lora_image_encoder")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    def build() -> Any:
        sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
        encoder = ImageEncoderViT(**sizes, out_chans=16, window_size=2, global_attn_indexes=(1,), use_rel_pos=True)
        two_way = TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=32, num_heads=2)
        prompts = PromptEncoder(16, (4, 4), (32, 32), 4)
        return Sam(encoder, prompts, MaskDecoder(num_multimask_outputs=3, transformer=two_way, transformer_dim=16))

    model = build()
    randomize(model)
    write_model(tmp_path / "base", {name: each.clone() for name, each in model.state_dict().items()}, None)
    wrapped = samed.LoRA_Sam(model, 4)
    randomize(wrapped)  # also the base's, which is loaded again
    base = load_model(tmp_path / "base")
    for name, parameter in model.named_parameters():
        plain = name.replace("qkv.qkv.", "qkv.")
        if plain in base and not name.startswith(("mask_decoder", "prompt_encoder")):
            parameter.data = base[plain].clone()
    path, options = tmp_path / "epoch_1.pth", {}
    if saved == "numbered":
        wrapped.save_lora_parameters(str(path))
    else:
        options = {"alpha": 4}
        torch.save({saved.removesuffix("state") + name: each for name, each in wrapped.state_dict().items()}, path)
    loratool.merge(tmp_path / "base", path, tmp_path / "out", undo=False, **options)
    merged = build()
    merged.load_state_dict(load_model(tmp_path / "out"))
    plain = build()
    plain.load_state_dict(base)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours, before = (each.image_encoder(image) for each in (model, merged, plain))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) and not torch.allclose(before, theirs, atol=1e-3)
    for name, each in merged.state_dict().items():
        if not name.startswith("image_encoder"):
            assert torch.equal(each, model.state_dict()[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "alpha", "saved"), [(4, 8, "numbered"), (4, 7, "numbered"), (2, 6, "numbered"), (4, 8, "state")]
)
def test_a_file_of_lora_vit_is_merged_as_its_model_runs_it(
    tmp_path: Path, trainer: Import, rank: int, alpha: int, saved: str
) -> None:
    lora = trainer("lora_vit", "lora")
    import timm

    def build() -> Any:
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5
        ).eval()

    model = build()
    randomize(model)
    write_model(tmp_path / "base", {name: each.clone() for name, each in model.state_dict().items()}, None)
    wrapped = lora.LoRA_ViT_timm(model, rank, alpha)  # 0 classes: the classifier stays
    for n, layer in enumerate(wrapped.w_Bs):
        layer.weight.data = weights(*layer.weight.shape, seed=n)
    more = (
        [] if saved == "numbered" else ["proj_3d", "proj_3d.bias"]
    )  # a layer that the code adds, for pictures of three dimensions
    if saved == "numbered":
        wrapped.save_lora_parameters(str(tmp_path / "a.safetensors"))
        assert "fc_32in_5out" in load_file(tmp_path / "a.safetensors")
    else:
        save_file({name: each.contiguous() for name, each in wrapped.state_dict().items()}, tmp_path / "a.safetensors")
    loratool.merge(
        tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", alpha=float(alpha), undo=False, exclude=more
    )
    merged = build()
    merged.load_state_dict(load_model(tmp_path / "out"))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(merged(image), wrapped(image), rtol=1e-4, atol=1e-5)


def a_state(path: Path, wrapper: str = "", layers: int = 2, r: int = 2, width: int = 4, **more: Tensor) -> Any:
    """Write the factors of a state by the names of their layers; return them as `written` does."""
    numbered = written(path, layers, r, width)
    names = {f"w_{side}_{n:03d}": (n // 2, f"linear_{side}_{'qv'[n % 2]}") for side in "ab" for n in range(2 * layers)}
    paths = {name: f"{wrapper}{MAKERS}.{layer}.attn.qkv.{end}.weight" for name, (layer, end) in names.items()}
    save_file({paths[name]: each for name, each in numbered.items()} | more, path)
    return numbered


@pytest.mark.parametrize("wrapper", ["", "sam.", "module.sam."])
def test_a_state_s_layers_are_named(tmp_path: Path, wrapper: str) -> None:
    """The layer under the factors, as in a state of all tensors, takes its place first."""
    path, qkv = tmp_path / "a.safetensors", f"{MAKERS}.1.attn.qkv"
    under = {f"{wrapper}{qkv}.qkv.weight": weights(12, 4, seed=70), f"{wrapper}{qkv}.qkv.bias": weights(12, seed=71)}
    tensors = a_state(path, wrapper, **under)
    base = a_base(tmp_path / "base", layers=3, **{f"{qkv}.bias": weights(12, seed=5)})
    with pytest.raises(NeedsFlag, match="whose code has the scale"):
        loratool.merge(tmp_path / "base", path, tmp_path / "out")
    with pytest.raises(UsageError, match="no multiple of the rank 2"):
        loratool.merge(tmp_path / "base", path, tmp_path / "out", alpha=3)
    loratool.merge(tmp_path / "base", path, tmp_path / "out", alpha=4)
    merged = load_model(tmp_path / "out")
    for n, W in enumerate((base[f"{MAKERS}.0.attn.qkv.weight"], under[f"{wrapper}{qkv}.qkv.weight"])):
        assert torch.equal(merged[f"{MAKERS}.{n}.attn.qkv.weight"], expected(W, tensors, n, 2))
    assert torch.equal(merged[f"{qkv}.bias"], under[f"{wrapper}{qkv}.qkv.bias"])
    assert loratool.verify(tmp_path / "base", path, tmp_path / "out", alpha=4).ok
    loratool.unmerge(tmp_path / "out", path, tmp_path / "back", alpha=4)
    back = load_model(tmp_path / "back")
    assert all(torch.equal(back[name], base[name]) for name in base)


def test_a_state_of_a_variant_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    path, qkv = tmp_path / "a.safetensors", f"{MAKERS}.0.attn.qkv"
    a_state(path, **{f"{qkv}.linear_a_q2.weight": weights(2, 4)})
    with pytest.raises(InputError, match="is of a variant of this code"):
        open_adapter(path, 2.0)
    a_state(path)
    twice = {f"sam.{name}": each.clone() for name, each in load_file(path).items()}
    save_file({**load_file(path), **twice}, path)
    with pytest.raises(InputError, match="like another layer of the file"):
        open_adapter(path, 2.0)
    a_state(path)
    save_file({name: each for name, each in load_file(path).items() if "0.attn.qkv.linear_b_v" not in name}, path)
    with pytest.raises(InputError, match="is missing, of four tensors of its layer"):
        open_adapter(path, 2.0)
    assert run("inspect", path, "--strict").exit_code == 1


def test_a_state_goes_to_transformers_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = a_state(path)
    base = a_base(tmp_path / "base", stem=TRANSFORMERS)
    loratool.convert(path, tmp_path / "peft", to="peft", base=tmp_path / "base", alpha=2)
    for adapter, out, alpha in ((path, "one", 2), (tmp_path / "peft", "two", None)):
        loratool.merge(tmp_path / "base", adapter, tmp_path / out, undo=False, alpha=alpha)
        for n in range(2):
            name = f"{TRANSFORMERS}.{n}.attn.qkv.weight"
            assert torch.equal(load_model(tmp_path / out)[name], expected(base[name], tensors, n))
