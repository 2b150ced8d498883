"""Hold every verb on every image and video family to diffusers' own models, in each spelling and each layout of a base.

What is right is in `dit_spellings`; `python tests/lib/models/families.py` counts the same checks. The maker's files
come from our tables, so they are held to diffusers' converters first, which know nothing of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lib import markdown
from lib.models import dit_models, families
from lib.models.dit_spellings import SPELLINGS, Cell, Subject, cells, known_refusal, outcome, same, telling_widths
from safetensors.torch import save_file
from torch import Tensor

from loratool.adapters.formats import holds_adapter
from loratool.architectures.roles import weight_role

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

# family -> diffusers' converter of its single files, and what of its text is another number in a tiny model
CONVERTERS: dict[str, tuple[str, dict[str, str]]] = {
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "flux": ("convert_flux_transformer_checkpoint_to_diffusers", {"3072": "16"}),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "flux3": ("convert_flux3_transformer_checkpoint_to_diffusers", {}),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", {"3072": "16"}),
    "qwen_image21": ("convert_qwen_image21_transformer_checkpoint_to_diffusers", {}),
    "z_image": ("convert_z_image_transformer_checkpoint_to_diffusers", {}),
    "lumina2": ("convert_lumina2_to_diffusers", {"2304": "24", "768": "8"}),
    "hidream": ("convert_hidream_transformer_to_diffusers", {}),
    "wan": ("convert_wan_transformer_to_diffusers", {}),
    "wan_animate2": ("convert_wan_animate_2_transformer_to_diffusers", {}),
    "hunyuan_video": ("convert_hunyuan_video_transformer_to_diffusers", {"3072": "16"}),
    "ltx": ("convert_ltx_transformer_checkpoint_to_diffusers", {}),
    "ltx2": ("convert_ltx2_transformer_to_diffusers", {}),
    "mochi": ("convert_mochi_transformer_checkpoint_to_diffusers", {"48": "3"}),
    "auraflow": ("convert_auraflow_transformer_checkpoint_to_diffusers", {}),
    "sana": ("convert_sana_transformer_to_diffusers", {}),
    # It empties the file before it looks which Cosmos that is, and takes all for the second.
    "cosmos1": (
        "convert_cosmos_transformer_checkpoint_to_diffusers",
        {'"net.blocks.block1.blocks.0.block.attn.to_q.0.weight" in checkpoint': "True"},
    ),
    "cosmos_predict2": ("convert_cosmos_transformer_checkpoint_to_diffusers", {}),
    "krea2": ("convert_krea2_transformer_checkpoint_to_diffusers", {}),
    "minimax_h3": ("convert_minimax_h3_transformer_checkpoint_to_diffusers", {}),
    "ernie_image": ("convert_ernie_image_transformer_checkpoint_to_diffusers", {}),
}
# what the converter wants and diffusers' model has not
WANTED = {"sana": ("pos_embed", "y_embedder.y_embedding")}
# what Sana-Video has beside Sana's modules, in diffusers' `scripts/convert_sana_video_to_diffusers.py`
OF_SANA_VIDEO = {
    ".cross_attn.q_norm.": ".attn2.norm_q.",
    ".cross_attn.k_norm.": ".attn2.norm_k.",
    ".attn.q_norm.": ".attn1.norm_q.",
    ".attn.k_norm.": ".attn1.norm_k.",
    ".mlp.t_conv.": ".ff.conv_temp.",
}
# maker's names that the converter leaves, and that its own scripts and readers of LoRA do not
LEFT = {
    "wan/flf2v": {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"},
    "ltx2/2.3": {"prompt_adaln_single": "prompt_adaln"},
}

DEFAULT = ("flux", "wan", "qwen_image", "z_image", "hunyuan_video")  # one of each shape of table


def some(names: tuple[str, ...]) -> list[object]:
    """Return the cases as parameters: those of the default run, and the rest slow."""
    return [pytest.param(case, marks=() if case in names else pytest.mark.slow) for case in dit_models.MODELS]


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices this small, threads are waited for
    with telling_widths():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [c for c in some(DEFAULT) if dit_models.family_of(c.values[0]) in CONVERTERS])  # type: ignore[attr-defined]
def test_the_makers_file_is_what_diffusers_converts(case: str, tmp_path: Path) -> None:
    """Every tensor of the maker's file becomes the one of diffusers' that it was made of, bit for bit."""
    subject = Subject(case, tmp_path)
    name, texts = CONVERTERS[subject.family.key]
    source = inspect.getsource(getattr(single_file, name))
    for theirs, ours in texts.items():
        assert theirs in source
        source = source.replace(theirs, ours)
    space = dict(vars(single_file))
    exec(source, space)
    file = subject.renamed("maker", subject.base)
    file |= {wanted: torch.zeros(1) for wanted in WANTED.get(subject.family.key, ())}
    found: dict[str, Tensor] = space[name](file, config=dit_models.build(case).config)
    for theirs, ours in LEFT.get(case, {}).items():
        found = {each.replace(theirs, ours): tensor for each, tensor in found.items()}
    same(found, subject.base)


def test_sana_videos_file_is_converted_as_sanas(tmp_path: Path) -> None:
    """The script that converts it is no part of diffusers; the converter of Sana reads what both have."""
    subject = Subject("sana_video", tmp_path)
    file = subject.renamed("maker", subject.base) | {wanted: torch.zeros(1) for wanted in WANTED["sana"]}
    found: dict[str, Tensor] = single_file.convert_sana_transformer_to_diffusers(file)
    found = {name.replace("patch_embed.proj.", "patch_embedding."): tensor for name, tensor in found.items()}
    for name, tensor in file.items():  # it takes out what it reads
        theirs, ours = next((theirs, ours) for theirs, ours in OF_SANA_VIDEO.items() if theirs in name)
        found[name.replace("blocks.", "transformer_blocks.").replace(theirs, ours)] = tensor
    same(found, subject.base)


# case of the default run -> verb -> the arguments of one check: each verb once or twice, on another shape of table
QUICK: dict[str, dict[str, list[tuple[str, ...]]]] = {
    "flux": {
        "merge": [("SimpleTuner LyCORIS", "bare"), ("DiffSynth", "diffusion_model.")],
        "convert": [("diffusers", "kohya")],
        "verify": [("kohya, maker's", "component")],
    },
    "wan": {
        "merge": [("ComfyUI, alpha", "component"), ("VideoX-Fun", "pipeline"), ("PEFT", "model.diffusion_model.")],
        "extract": [("bare", "diffusers")],
        "unmerge": [("kohya, maker's", "component")],
    },
    "qwen_image": {
        "merge": [("Lightning", "component"), ("OneTrainer legacy", "bare")],
        "init": [("component", "diffusers")],
        "inspect": [("Lightning", "component")],
        "diff": [("SimpleTuner LyCORIS",)],
    },
    "z_image": {
        "merge": [("save_lora_adapter", "bare"), ("kohya, maker's", "bare, diffusers'")],
        "convert": [("ComfyUI, maker's",), ("diffusers", "kohya", "apart")],
        "resize": [("kohya, maker's",)],
    },
    "hunyuan_video": {
        "merge": [("ComfyUI", "component"), ("diffusion-pipe", "model.model.")],
        "convert": [("comfy",)],
        "combine": [("kohya, maker's", "comfy")],
        "convert a base": [("model.model.", "diffusers")],
    },
}


def hold(subject: Subject, chosen: list[Cell]) -> None:
    found = {(cell.verb, *cell.args): (cell, *outcome(subject, cell)) for cell in chosen}
    bad = {
        args: f"{state}: {message}"
        for args, (cell, state, message) in found.items()
        if state != "right" and not (state == "refused" and known_refusal(subject, cell, message))
    }
    assert not bad


@pytest.mark.parametrize("case", QUICK)
def test_each_shape_of_table(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path)
    wanted = {(verb, args) for verb, every in QUICK[case].items() for args in every}
    chosen = [cell for cell in cells(subject) if (cell.verb, cell.args) in wanted]
    assert {(cell.verb, cell.args) for cell in chosen} == wanted
    hold(subject, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("case", dit_models.MODELS)
def test_every_verb_on_every_family(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path)
    hold(subject, list(cells(subject)))


def test_a_wrong_table_is_found(tmp_path: Path) -> None:
    """Two rows that change places: the maker's file is another, and the check of a merge says so."""
    subject = Subject("wan", tmp_path)
    rows = dict(subject.namings["maker"])
    first, second = "blocks.0.self_attn.q.weight", "blocks.0.self_attn.k.weight"
    rows[first], rows[second] = rows[second], rows[first]
    subject.__dict__["namings"] = {**subject.namings, "maker": rows}
    cell = next(c for c in cells(subject) if c.args == ("diffusers", "bare") and c.verb == "merge")
    state, message = outcome(subject, cell)
    assert state == "wrong" and "self_attn" in message


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_modules_called_up_and_down_are_no_adapter(prefix: str, tmp_path: Path) -> None:
    """Krea's MLPs have these names, which are XLabs' factors only after a processor."""
    names = [f"{prefix}blocks.0.mlp.{each}.weight" for each in ("up", "down")]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    assert not holds_adapter(tmp_path / "a.safetensors")
    other = f"{prefix}double_blocks.0.processor.qkv_lora1.up.weight"
    save_file({other: torch.ones(2, 2)}, tmp_path / "b.safetensors")
    assert holds_adapter(tmp_path / "b.safetensors")


def test_an_embedding_is_one_in_a_pipeline_too() -> None:
    for name in ("embed_tokens", "time_text_embed.addition_t_embedding", "cond_type_embed"):
        assert weight_role(name, 2, True) == weight_role(f"transformer/{name}", 2, True) == "embedding"
    assert weight_role("text_encoder/lm_head", 2, True) == "head"
    assert weight_role("transformer/proj_out", 2, True) == "linear"


def test_the_guide_has_every_family_and_spelling() -> None:
    """A family is counted if diffusers has its class; a UNet's is held by the tests of `families.unet`."""
    guides = (families.FAMILY_GUIDE, families.SPELLING_GUIDE)
    text = "".join(markdown.between(guide.read_text(), families.MARK) for guide in guides)
    rows = [line.split(" | ")[0].removeprefix("| ").strip() for line in text.splitlines()]
    for key, family in families.FAMILIES.items():
        assert family.up_attention or key in dit_models.TELLING or not family.diffusers_class
        assert (family.title in rows) == (key in dit_models.TELLING)
    assert set(SPELLINGS) <= set(rows) and "0 wrong" in text
