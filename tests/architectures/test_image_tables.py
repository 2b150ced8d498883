"""Hold the name tables of image models against diffusers: its own modules on the meta device, its own conversion of
single-file checkpoints, by published configurations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from loratool.architectures.families import FAMILIES
from loratool.architectures.families.lookup import locate
from loratool.architectures.families.unet import diffusers_to_sgm, sgm_to_diffusers
from loratool.architectures.image import image_modules

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from models import sd15_unet

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
# unet/config.json of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0
SD15: dict[str, Any] = {
    "sample_size": 64,
    "down_block_types": [CROSS.format("Down")] * 3 + [PLAIN.format("Down")],
    "up_block_types": [PLAIN.format("Up")] + [CROSS.format("Up")] * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = {
    **SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": [PLAIN.format("Down")] + [CROSS.format("Down")] * 2,
    "up_block_types": [CROSS.format("Up")] * 2 + [PLAIN.format("Up")],
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd15": (SD15, 391, 401), "sd21": (SD21, 391, 401), "sdxl": (SDXL, 1050, 1056)}
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module", params=UNETS)
def unet(request: pytest.FixtureRequest) -> tuple[Any, int, int, dict[str, str]]:
    """Return diffusers' model without memory, its count of modules, ComfyUI's, and our diffusers' path -> sgm's."""
    config, modules, comfy = UNETS[request.param]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    attends = request.param == "sdxl"  # in an SD 1 or 2 the first upsampler stands behind no attention
    paths = [name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")]
    names = {path: diffusers_to_sgm(path, attends or not path.startswith("up_blocks.0.")) for path in paths}
    return model, modules, comfy, names


def test_counts_without_collision(unet: tuple[Any, int, int, dict[str, str]]) -> None:
    """391 and 1050 modules have a weight. ComfyUI's map has a shortcut for each residual block and the embeddings of
    labels, whether or not they exist: 401 and 1056.
    """
    _, modules, comfy, names = unet
    assert len(names) == modules and len(set(names.values())) == modules
    blocks = {path.rpartition(".")[0] for path in names if path.endswith(".conv1")}
    more = {f"{block}.conv_shortcut" for block in blocks} | {f"add_embedding.linear_{i}" for i in (1, 2)}
    every = set(names) | more
    assert len(every) == comfy
    for spellings in (every, {diffusers_to_sgm(path, path not in names) for path in more} | set(names.values())):
        assert len(spellings) == comfy and len({each.replace(".", "_") for each in spellings}) == comfy


def test_names_and_shapes_are_diffusers(unet: tuple[Any, int, int, dict[str, str]]) -> None:
    """Under our sgm names, diffusers' own conversion of a single file finds each of its tensors and no other."""
    model, _, _, names = unet
    state = model.state_dict()
    single = {f"{PREFIX}{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in state.items()}
    assert len(single) == len(state)
    back = single_file.convert_ldm_unet_checkpoint(dict(single), model.config)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in state.items()}
    assert all(back[n] is state[n] for n in state)  # the very tensor, not one of the same shape
    assert all(sgm_to_diffusers(own) == path for path, own in names.items())


def test_a_base_answers_to_both_spellings(unet: tuple[Any, int, int, dict[str, str]]) -> None:
    model, _, _, names = unet
    shapes = {n.removesuffix(".weight"): tuple(t.shape) for n, t in model.state_dict().items() if n.endswith(".weight")}
    single = image_modules({f"{PREFIX}{own}.weight": shapes[path] for path, own in names.items()})
    folder = image_modules({f"{path}.weight": shape for path, shape in shapes.items()})
    for path, own in names.items():
        for found, tensor in ((single, f"{PREFIX}{own}.weight"), (folder, f"{path}.weight")):
            for spelling in (path, own):
                (rows,) = found.find("unet", spelling)
                assert rows.tensor == tensor and (rows.start, rows.stop, rows.skip) == (0, shapes[path][0], 0)
        for spelling in (path, own):
            located = locate(FAMILIES["sdxl"], spelling.replace(".", "_"))
            assert located and located.path == spelling and located.diffusers == (path,)


def test_the_benchmarks_sd15_is_one() -> None:
    """The names and shapes on which speed is measured are the model's."""
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**SD15)
    shapes = dict(sd15_unet())
    made = {f"{PREFIX}{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    biases = {name.replace(".weight", ".bias"): torch.empty(0, device="meta") for name in made}
    found = single_file.convert_ldm_unet_checkpoint({**made, **biases}, model.config)
    wanted = {n: t.shape for n, t in model.state_dict().items() if n.endswith(".weight")}
    assert {n: t.shape for n, t in found.items() if n.endswith(".weight")} == wanted and len(wanted) == len(shapes)


def same_rows(found: Mapping[str, Tensor], single: Mapping[str, Tensor], component: str) -> set[str]:
    """Check that each of diffusers' tensors is made of just the rows of our table; return the names that have some."""
    modules = image_modules({name: tuple(t.shape) for name, t in single.items()})
    checked = set()
    for name, tensor in found.items():
        where = modules.find(component, name.removesuffix(".weight"))
        if where:
            ours = torch.full((len(tensor),), -1.0)
            for rows in where:
                assert rows.module_rows == len(tensor)
                column = single[rows.tensor].reshape(len(single[rows.tensor]), -1)[:, 0]
                ours[rows.skip : rows.skip + rows.stop - rows.start] = column[rows.start : rows.stop]
            assert torch.equal(ours, tensor.reshape(len(tensor), -1)[:, 0].float()), name
            checked.add(name)
    return checked


def numbered(rows: int, width: int, seed: int) -> Tensor:
    """Make a matrix whose rows differ from each other and from those of other seeds, without its memory."""
    return (torch.arange(rows, dtype=torch.float32) + 100_000 * seed).unsqueeze(1).expand(rows, width)


# Black Forest Labs' names of Flux (flux/model.py): module -> (out, in), of the published sizes
D = 3072
DOUBLE = {
    **{f"{side}_attn.qkv": (3 * D, D) for side in ("img", "txt")},
    **{f"{side}_attn.proj": (D, D) for side in ("img", "txt")},
    **{f"{side}_mlp.0": (4 * D, D) for side in ("img", "txt")},
    **{f"{side}_mlp.2": (D, 4 * D) for side in ("img", "txt")},
    **{f"{side}_mod.lin": (6 * D, D) for side in ("img", "txt")},
}
SINGLE = {"linear1": (7 * D, D), "linear2": (D, 5 * D), "modulation.lin": (3 * D, D)}
OUTSIDE = {
    "img_in": (D, 64),
    "txt_in": (D, 4096),
    "time_in.in_layer": (D, 256),
    "time_in.out_layer": (D, D),
    "vector_in.in_layer": (D, 768),
    "vector_in.out_layer": (D, D),
    "guidance_in.in_layer": (D, 256),
    "guidance_in.out_layer": (D, D),
    "final_layer.linear": (64, D),
    "final_layer.adaLN_modulation.1": (2 * D, D),
}


def checkpoint(shapes: Mapping[str, tuple[int, int]], extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and biases of these modules, and other tensors."""
    weights = {f"{name}.weight": numbered(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    biases = {
        name.replace(".weight", ".bias"): w[:, 0] + 100_000 * len(weights) for name, w in weights.items()
    }  # those of other rows than any weight's
    return weights | biases | dict(extra)


def vectors(names: Iterable[str], size: int) -> dict[str, Tensor]:
    return {name: numbered(size, 1, seed=100 + i)[:, 0] for i, name in enumerate(names)}


def test_flux() -> None:
    shapes = {f"double_blocks.0.{name}": shape for name, shape in DOUBLE.items()}
    shapes |= {f"single_blocks.0.{name}": shape for name, shape in SINGLE.items()} | OUTSIDE
    norms = [f"double_blocks.0.{side}_attn.norm.{x}_norm.scale" for side in ("img", "txt") for x in ("query", "key")]
    norms += [f"single_blocks.0.norm.{x}_norm.scale" for x in ("query", "key")]
    single = checkpoint(shapes, vectors(norms, 128))
    found = single_file.convert_flux_transformer_checkpoint_to_diffusers(dict(single))
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert same_rows(found, single, "unet") == found.keys()


def test_sd3() -> None:
    """Stability's names of SD 3.5 medium, two blocks: the last has another modulation, the first a second attention."""
    width = 1536
    block = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
        "adaLN_modulation.1": (6 * width, width),
    }
    shapes = {f"joint_blocks.{i}.{side}.{n}": s for i in (0, 1) for side in ("x_block", "context_block")
              for n, s in block.items()}  # fmt: skip
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        del shapes[f"joint_blocks.1.context_block.{name}"]
    shapes["joint_blocks.1.context_block.adaLN_modulation.1"] = (2 * width, width)
    shapes |= {f"joint_blocks.0.x_block.attn2.{n}": block[f"attn.{n}"] for n in ("qkv", "proj")}
    shapes["joint_blocks.0.x_block.adaLN_modulation.1"] = (9 * width, width)
    shapes |= {
        "context_embedder": (width, 4096),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 2048),
        "y_embedder.mlp.2": (width, width),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    own = {"x_embedder.proj.weight": torch.zeros(width, 16, 2, 2), "x_embedder.proj.bias": torch.zeros(width)}
    norms = [f"joint_blocks.{i}.{side}.attn.ln_{x}.weight" for i in (0, 1) for side in ("x_block", "context_block")
             for x in "qk"] + [f"joint_blocks.0.x_block.attn2.ln_{x}.weight" for x in "qk"]  # fmt: skip
    extra = {**own, **vectors(norms, 64), "pos_embed": torch.zeros(1, 4, width)}
    single = checkpoint(shapes, extra)
    found = single_file.convert_sd3_transformer_checkpoint_to_diffusers(dict(single))
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(
            num_layers=2, attention_head_dim=64, num_attention_heads=24, caption_projection_dim=width,
            joint_attention_dim=4096, pos_embed_max_size=2, qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert same_rows(found, single, "unet") == found.keys() - {"pos_embed.pos_embed"}  # a parameter alone


@pytest.mark.parametrize(
    ("prefix", "component"),
    [("cond_stage_model.model.", "text_encoder"), ("conditioner.embedders.1.model.", "text_encoder_2")],
)
def test_openclip(prefix: str, component: str) -> None:
    width, layer = 48, "transformer.resblocks.0"
    shapes = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    single = checkpoint({f"{prefix}{layer}.{name}": shape for name, shape in shapes.items()}, {})
    single[f"{prefix}{layer}.attn.in_proj_weight"] = numbered(3 * width, width, 9)
    single[f"{prefix}{layer}.attn.in_proj_bias"] = numbered(3 * width, 1, 10)[:, 0]
    norms = [f"{layer}.ln_1", f"{layer}.ln_2", "ln_final"]
    single |= vectors([f"{prefix}{name}.{x}" for name in norms for x in ("weight", "bias")], width)
    single[f"{prefix}text_projection"] = torch.zeros(width, width)
    found = single_file.convert_open_clip_checkpoint(None, dict(single), prefix)
    image = {**single, f"{PREFIX}input_blocks.0.0.weight": torch.zeros(1, 1)}  # without which it is no image model
    assert same_rows(found, image, component) == found.keys() - {"text_projection.weight"}  # it is transposed
